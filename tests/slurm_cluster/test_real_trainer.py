"""Submit, walltime signal, requeue and finish with the real trainer on two nodes: same weights, bitwise."""

import json
import sys

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.data.conftest import SEQUENCE_LENGTH, options, write_corpus
from tests.slurm_cluster.conftest import command, field, state, wait_for

STEPS = 60


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    from megatron_eso.data.prepare import prepare

    folder = tmp_path_factory.mktemp("real")
    write_corpus(folder / "corpus.jsonl")
    prepare([str(folder / "corpus.jsonl")], folder / "set", options(), num_processes=1)
    (folder / "run.yaml").write_text(
        f"""
model: {{hidden_size: 32, num_layers: 2, num_heads: 2, vocab_size: 300, max_length: 32}}
data: {{sources: [{{path: {folder}/set/train}}], validation: {{v: {folder}/set/validation}}}}
train: {{sequence_length: {SEQUENCE_LENGTH}, steps: {STEPS}, global_batch_rows: 16, micro_batch_rows: 2,
  log_every_steps: 1}}
precision: {{dtype: fp32}}
eval: {{num_rows: 4}}
sample: {{num_samples: 0}}
"""
    )
    return folder / "run.yaml"


def submit(config, folder):
    said = command(
        "submit", config, "--cluster", "local", f"folder={folder}", f"cluster.python={sys.executable}",
        f"cluster.host_python={sys.executable}", "cluster.memory=3000",
    ).stdout  # fmt: skip
    return said.split()[1]


def status(folder):
    file = folder / "status.json"
    return json.loads(file.read_text()) if file.exists() else {}


def finished(slurm, job, folder):
    def ended():
        return state(slurm, job) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")

    wait_for(ended, 240)
    output = "".join(p.read_text() for p in folder.glob("slurm-*.out"))
    assert status(folder).get("state") == "finished", output
    return output


def weights(folder, out):
    newest = max((folder / "checkpoints").glob("step_*"))
    assert newest.name == f"step_{STEPS:010d}"
    dcp_to_torch_save(newest, out)
    return torch.load(out, weights_only=False)


def tensors(tree, prefix=""):
    if isinstance(tree, torch.Tensor):
        yield prefix, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from tensors(value, f"{prefix}/{key}")
    elif isinstance(tree, (list, tuple)):
        for i, value in enumerate(tree):
            yield from tensors(value, f"{prefix}/{i}")


@pytest.mark.filterwarnings("ignore")
def test_a_run_stopped_at_the_time_limit_ends_with_the_same_weights(slurm, config, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finished(slurm, submit(config, whole), whole)
    job = submit(config, cut)
    wait_for(lambda: status(cut).get("step", 0) >= 2, 120)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    wait_for(lambda: field(slurm, job, "Restarts") == "1", 120)
    assert status(cut)["state"] == "stopped" and 2 <= status(cut)["step"] < STEPS
    output = finished(slurm, job, cut)
    assert "continuing from" in output
    expected = dict(tensors(weights(whole, tmp_path / "a.pt")))
    found = dict(tensors(weights(cut, tmp_path / "b.pt")))
    assert expected.keys() == found.keys() and len(expected) > 10
    different = [name for name, value in expected.items() if not torch.equal(value, found[name])]
    assert not different, different
    assert "finished" in command("status", cut).stdout
