"""What the configuration becomes for Megatron on a GPU; building it needs no GPU."""

import inspect
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import silu

from megatron_eso.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_eso.errors import ConfigError
from megatron_eso.launch import starter
from megatron_eso.launch.starter import can_be_warm
from megatron_eso.model.megatron_config import transformer_config
from megatron_eso.parallel.device import (
    Device,
    gpu_of_rank,
    idle_gpus,
    require_no_gpu_was_asked_for,
)
from megatron_eso.parallel.megatron_patches import silence_megatron_messages
from megatron_eso.parallel.optimizer import buffer_settings

# Megatron says this about its own default.
pytestmark = pytest.mark.filterwarnings("ignore:full scope is deprecated")


@pytest.mark.parametrize(
    ("local_rank", "num_gpus", "environ", "gpu"),
    [
        (0, 1, {}, 0),
        (3, 8, {}, 3),
        (3, 8, {"SLURM_LOCALID": "3"}, 3),
        (3, 1, {"SLURM_LOCALID": "3"}, 0),
    ],
)
def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one_that_slurm_shows_it(
    local_rank, num_gpus, environ, gpu
):
    assert gpu_of_rank(local_rank, num_gpus, environ) == gpu


def test_more_ranks_than_gpus_are_refused_with_the_numbers():
    with pytest.raises(ConfigError, match=r"rank 4 .* 4 can be seen .CUDA_VISIBLE_DEVICES=0,1,2,3"):
        gpu_of_rank(4, 4, {"CUDA_VISIBLE_DEVICES": "0,1,2,3"})


def test_ranks_that_one_task_of_slurm_has_started_do_not_share_its_only_gpu():
    """Otherwise only NCCL refuses two ranks on one GPU, in words that name no setting."""
    for local_rank in (1, 3):
        with pytest.raises(ConfigError, match=rf"rank {local_rank} .* 1 can be seen"):
            gpu_of_rank(local_rank, 1, {"SLURM_LOCALID": "0"})


@pytest.mark.parametrize(
    ("num_ranks", "num_gpus", "said"),
    [
        (1, 8, ["1 of the 8 GPUs seen here is used; --ranks 8 uses all of them"]),
        (8, 8, []),
        (16, 8, []),
    ],
)
def test_gpus_that_stay_idle_are_told_of(monkeypatch, num_ranks, num_gpus, said):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert idle_gpus(Device(torch.device("cuda", 0), "nccl"), num_ranks) == said
    assert idle_gpus(Device(torch.device("cpu"), "gloo"), num_ranks) == []


@pytest.mark.parametrize(
    ("nodes", "numbers"), [(["n0", "n1"], [1, 1]), (["n0", "n0"], [2, 2])], ids=["two", "one"]
)
def test_the_ranks_of_other_nodes_use_no_gpu_of_this_one(two_ranks, nodes, numbers):
    told = two_ranks.run("idle_gpus_told", nodes)
    assert told == [[f"{number} ranks here"] for number in numbers]


def test_a_barrier_over_nccl_does_not_advise_what_would_line_up_the_exchanges_of_stages():
    """PyTorch advises naming the GPU when groups are created; a group then has one communicator for all."""
    source = inspect.getsource(torch.distributed.barrier)
    words = "barrier(): using the device under current context. "
    assert f'"{words}"' in source  # if this fails, PyTorch's words have changed
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        silence_megatron_messages()
        warnings.warn(f"{words}You can specify `device_id`", stacklevel=1)
    assert not said


def test_a_job_that_asked_for_gpus_does_not_train_on_the_cpu():
    with pytest.raises(ConfigError, match=r"asked for 8 GPUs a node .* sees none"):
        require_no_gpu_was_asked_for({"MEGATRON_ESO_GPUS": "8"})
    require_no_gpu_was_asked_for({"MEGATRON_ESO_GPUS": "0"})
    require_no_gpu_was_asked_for({})


@pytest.mark.parametrize("name", ["nvidia0", "dxg"], ids=["linux", "windows-subsystem-for-linux"])
def test_ranks_are_not_forked_where_there_is_a_gpu(tmp_path, monkeypatch, name):
    """CUDA does not work in a process forked from one that has asked it for devices."""
    monkeypatch.setattr(starter, "_DEVICES", tmp_path)
    (tmp_path / "nvidiactl").touch()
    assert can_be_warm()
    (tmp_path / name).touch()
    assert not can_be_warm()


@pytest.mark.parametrize("given", ["1", "32"])
def test_the_order_of_communication_is_asked_for_before_cuda_starts(given):
    """CUDA reads the variable once; Megatron imports Transformer Engine, which may start it."""
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    script = (
        "import os, torch\n"
        "seen = []\n"
        "class Megatron:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'megatron.core':\n"
        f"            seen.append(os.environ.get('{name}'))\n"
        "import sys\n"
        "sys.meta_path.insert(0, Megatron())\n"
        "import megatron_eso.train.session\n"
        "print(seen, torch.cuda.is_initialized())\n"
    )
    environ = {k: v for k, v in os.environ.items() if k != name}
    environ |= {name: given} if given != "1" else {}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, env=environ,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.stdout == f"['{given}'] False\n", done.stderr[-2000:]


def on_gpu(**model):
    precision = PrecisionConfig(dtype="bf16", backend="torch", attention="split")
    return transformer_config(ModelConfig(**model), ParallelConfig(), precision, on_gpu=True)


@pytest.mark.parametrize(("activation", "is_fused"), [("swiglu", True), ("gelu", False)])
def test_swiglu_is_fused_on_a_gpu(activation, is_fused):
    """Megatron has no fused form of the tanh GELU."""
    assert on_gpu(activation=activation).bias_activation_fusion is is_fused


@pytest.mark.slow
def test_the_fused_swiglu_is_the_same_function(one_rank):
    values, gradients, expected_values, expected_gradients = one_rank.run("fused_swiglu")[0]
    torch.testing.assert_close(torch.tensor(values), torch.tensor(expected_values))
    torch.testing.assert_close(torch.tensor(gradients), torch.tensor(expected_gradients))


def test_chunks_gather_whole_where_stages_interleave():
    """Otherwise each bucket of a chunk requests the next, which the schedule has already requested."""
    for virtual, is_aligned in ((1, False), (2, True)):
        parallel = ParallelConfig(pipeline=2, virtual_pipeline=virtual, overlap=True)
        settings = buffer_settings(parallel, SimpleNamespace(fp8_param=False), on_gpu=True)
        assert settings.align_param_gather is is_aligned


def test_weights_are_made_where_they_live():
    config = on_gpu()
    assert not config.use_cpu_initialization
    assert config.activation_func is silu
