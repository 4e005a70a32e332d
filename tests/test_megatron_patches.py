"""Each change to Megatron's behavior is still needed: a failure here means that a patch can go.

Reads the installed Megatron-Core's source text, so nothing is imported or patched.
"""

import importlib.util
from pathlib import Path

import pytest

CORE = Path(next(iter(importlib.util.find_spec("megatron.core").submodule_search_locations)))  # type: ignore


def source(name):
    return (CORE / name).read_text()


@pytest.mark.parametrize(
    ("patch", "file", "needle"),
    [
        ("CudaNamesMeanCpu: device", "pipeline_parallel/schedules.py", 'device="cuda"'),
        ("CudaNamesMeanCpu: device", "optimizer/clip_grads.py", "device='cuda'"),
        (
            "CudaNamesMeanCpu: Tensor.type()",
            "optimizer/distrib_optimizer.py",
            "'torch.cuda.FloatTensor'",
        ),
        (
            "CudaNamesMeanCpu: Tensor.cuda()",
            "models/common/language_module/language_module.py",
            ".cuda()",
        ),
        (
            "_patch_torch_cuda: current_device",
            "distributed/param_and_grad_buffer.py",
            "torch.cuda.current_device()",
        ),
        (
            "_patch_torch_cuda: synchronize",
            "pipeline_parallel/p2p_communication.py",
            "torch.cuda.synchronize()",
        ),
        ("_patch_random_state", "tensor_parallel/random.py", "torch.cuda.get_rng_state()"),
        ("_without_compiler", "jit.py", "jit_fuser = torch.compile"),
        (
            "_patch_buffers_of_one_rank",
            "distributed/param_and_grad_buffer.py",
            "grad_reduce_handle = dist_reduce_scatter_func(",
        ),
    ],
)
def test_megatron_still_needs_the_patch(patch, file, needle):
    assert needle in source(file), (
        f"{patch} in parallel/megatron_patches.py may no longer be needed"
    )


@pytest.mark.parametrize(
    "name",
    [
        "model_param_group_index_map",
        "def _get_model_param_range_map",
        "def _get_main_param_and_optimizer_states",
    ],
)
def test_the_distributed_optimizer_still_offers_what_parameters_py_reads(name):
    assert name in source("optimizer/distrib_optimizer.py")


def test_parameters_are_still_marked_as_split_only_where_they_are_initialised():
    """This is why model/megatron_config.py initializes with functions that leave weights unchanged."""
    layers = source("tensor_parallel/layers.py")
    assert "if config.perform_initialization:" in layers
