"""What a run reports as it trains."""

import json
from pathlib import Path
from re import findall
from types import SimpleNamespace

import pytest

from megatron_eso.train import metrics as module
from megatron_eso.train.guard import Quality
from megatron_eso.train.metrics import Metrics
from megatron_eso.train.step import StepReport
from tests.rank_jobs import small_config

KINDS = {"loss_diffusion": 2.0, "loss_sequential": 3.0}
PHASES = ("data", "rows", "forward_backward", "own_passes", "optimizer")


def report(step, tokens):
    seconds = dict.fromkeys(PHASES, 0.5)
    return StepReport(
        step, Quality.GOOD, 5.0, **KINDS, grad_norm=1.0, learning_rate=1e-3, data_tokens=tokens,
        seconds=seconds,
    )  # fmt: skip


def written(folder, monkeypatch, overrides, tokens, gpu=""):
    """Return the lines of steps of two seconds, which train on these numbers of tokens."""
    clock = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    session = SimpleNamespace(
        config=small_config(overrides), derived=SimpleNamespace(total_steps=9),
        device=SimpleNamespace(gpu_name=lambda: gpu, memory_gib=lambda: 1.0),
        ranks=SimpleNamespace(world_size=1),
    )  # fmt: skip
    metrics = Metrics(session, folder, peak=1e9)
    for step, number in enumerate(tokens, start=1):
        clock[0] += 2.0
        metrics.add(report(step, number))
    metrics.close()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_tokens_only_rise_and_speed_counts_what_was_trained_on(tmp_path, monkeypatch):
    """Also where padding varies, as with one document to a row."""
    overrides = ["train.log_every_steps=2", "train.global_batch_rows=8", "train.sequence_length=16"]
    lines = written(tmp_path, monkeypatch, overrides, [100, 40, 110, 10])
    assert [line["tokens"] for line in lines] == [128, 256, 512]
    assert [line["tokens_per_second"] for line in lines] == pytest.approx([50, 20, 30])


def test_the_document_explains_every_number(tmp_path, monkeypatch):
    overrides = ["precision.fp8=delayed"]
    (line,) = written(tmp_path, monkeypatch, overrides, [100], gpu="NVIDIA H100 80GB HBM3")
    text = (Path(__file__).parents[1] / "docs/reports.md").read_text()
    table = text.partition("| key | meaning, unit |\n")[2].partition("\n\n")[0]
    explained = {
        name for row in table.splitlines() for name in findall("`(.*?)`", row.split("|")[1])
    }
    assert explained == set(line)
