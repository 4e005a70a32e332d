"""What a run reports as it trains."""

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from re import findall
from types import SimpleNamespace

import pytest

from megatron_eso.train import metrics as module
from megatron_eso.train.guard import Quality
from megatron_eso.train.metrics import Metrics
from megatron_eso.train.step import StepReport
from tests.rank_jobs import LENGTH, small_config


@pytest.fixture
def metrics_of(tmp_path, monkeypatch):
    """Return a function that opens the metrics of nine steps on a named GPU, and their clock."""
    clock = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])

    def do(gpu="", ranks=1, overrides=()):
        every = ["train.log_every_steps=2", "train.global_batch_rows=8"]
        config = small_config([*every, *overrides])
        device = SimpleNamespace(gpu_name=lambda: gpu, memory_gib=lambda: 1.0)
        session = SimpleNamespace(
            config=config, derived=SimpleNamespace(total_steps=9), device=device,
            ranks=SimpleNamespace(world_size=ranks),
        )  # fmt: skip
        return Metrics(session, tmp_path, peak=1e9), clock

    return do


def report_of(step, tokens=100):
    return StepReport(step, Quality.GOOD, 5.0, math.nan, 5.0, 1.0, 1e-3, tokens, {"data": 0.5})


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_tokens_only_rise_and_speed_counts_what_was_trained_on(tmp_path, metrics_of):
    """Also where padding varies, as with one document to a row."""
    metrics, clock = metrics_of()
    for step, tokens in ((1, 100), (2, 40), (3, 110), (4, 10)):
        clock[0] += 2.0
        metrics.add(report_of(step, tokens))
    metrics.close()
    lines = lines_of(tmp_path)
    row_tokens = 8 * LENGTH
    assert [line["tokens"] for line in lines] == [s * row_tokens for s in (1, 2, 4)]
    assert [line["tokens_per_second"] for line in lines] == pytest.approx([50, 20, 30])


def test_phases_and_speed_are_means_over_the_steps_of_a_line(tmp_path, metrics_of, caplog):
    """The H200's peak is 989 TFLOP/s in bf16; an evaluation of 50 s between steps is no training."""
    caplog.set_level(logging.INFO)
    metrics, clock = metrics_of("NVIDIA H200", ranks=2)
    for step in range(1, 10):
        clock[0] += 2.0
        metrics.add(report_of(step))
        clock[0] += 50.0
        metrics.pause(clock[0] - 50.0)
        clock[0] += 1.0
    metrics.close()
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 4, 6, 8, 9]  # the first and the last too
    for line in lines:
        seconds = line["seconds_per_step"]
        assert seconds == pytest.approx(2.0 if line["step"] == 1 else 3.0)
        assert line["seconds_data"] == 0.5
        assert line["share_waiting_for_data"] == pytest.approx(0.5 / seconds)
        speed = line["model_flops_per_second"]
        assert line["share_of_matmul_peak"] == pytest.approx(speed / 1e9)
        assert line["mfu"] == pytest.approx(speed / (2 * 989e12))
    assert "step 6/9" in caplog.text and " 0:09 left" in caplog.text  # three steps of 3 s


def test_recomputed_flops_count_for_the_hardware_alone(tmp_path, metrics_of):
    metrics, clock = metrics_of("NVIDIA H200")
    metrics._hardware_flops = 3 * metrics._flops
    clock[0] += 2.0
    metrics.add(report_of(1))
    metrics.close()
    [line] = lines_of(tmp_path)
    assert line["hfu"] == pytest.approx(3 * line["mfu"])


def test_lines_go_on_after_one_that_a_crash_cut_off(tmp_path, metrics_of):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lo')
    metrics, clock = metrics_of()
    clock[0] += 2.0
    metrics.add(report_of(2))
    metrics.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])["step"] == 2


def test_the_document_explains_every_number(tmp_path, metrics_of):
    metrics, clock = metrics_of("NVIDIA H100 80GB HBM3", overrides=["precision.fp8=delayed"])
    clock[0] += 2.0
    phases = ("data", "rows", "forward_backward", "own_passes", "optimizer")
    metrics.add(replace(report_of(1), loss_diffusion=2.0, seconds=dict.fromkeys(phases, 0.1)))
    metrics.close()
    text = (Path(__file__).parents[1] / "docs/reports.md").read_text()
    table = text.partition("| key | meaning, unit |\n")[2].partition("\n\n")[0]
    cells = [row.split("|")[1] for row in table.splitlines()]
    assert {name for cell in cells for name in findall("`(.*?)`", cell)} == set(
        lines_of(tmp_path)[0]
    )
