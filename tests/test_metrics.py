"""What a run reports as it trains."""

import json
import math
from types import SimpleNamespace

import pytest

from megatron_eso.train import metrics as module
from megatron_eso.train.guard import Quality
from megatron_eso.train.metrics import Metrics
from megatron_eso.train.step import StepReport
from tests.rank_jobs import small_config


def test_tokens_only_rise_and_speed_counts_what_was_trained_on(tmp_path, monkeypatch):
    """Also where padding varies, as with one document to a row."""
    clock = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    config = small_config(["train.log_every_steps=2", "train.global_batch_rows=8"])
    device = SimpleNamespace(gpu_name=lambda: "", memory_gib=lambda: 1.0)
    session = SimpleNamespace(
        config=config, derived=SimpleNamespace(total_steps=9), device=device,
        ranks=SimpleNamespace(world_size=1),
    )  # fmt: skip
    metrics = Metrics(session, tmp_path, peak=1e9)
    for step, tokens in ((1, 100), (2, 40), (3, 110), (4, 10)):
        clock[0] += 2.0
        metrics.add(
            StepReport(step, Quality.GOOD, 5.0, math.nan, 5.0, 1.0, 1e-3, tokens, {"data": 0.5})
        )
    metrics.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    row_tokens = 8 * config.train.sequence_length
    assert [line["tokens"] for line in lines] == [s * row_tokens for s in (1, 2, 4)]
    assert [line["tokens_per_second"] for line in lines] == pytest.approx([50, 20, 30])
