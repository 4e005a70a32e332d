"""The GPU benchmark runs on a CPU with tiny shapes, so what will be measured is known to work."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from megatron_eso.config.precision_rules import DPA_RECIPE
from tests import released
from tools import bench_gpu

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "results.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tools.bench_gpu", "--smoke", "--out", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def test_every_section_gives_finite_numbers(rows):
    by_section = {}
    for row in rows:
        by_section.setdefault(row["section"], []).append(row)
        numbers = {name: v for name, v in row.items() if isinstance(v, float)}
        assert all(math.isfinite(v) for v in numbers.values()), row
        assert not str(row.get("result")).startswith("not measured") or row["what"] == "FP8", row
        assert all(v > 0 for name, v in numbers.items() if name != "loss_gap"), row
    expected = [
        "machine",
        "products",
        "correctness",
        "losses",
        "attention",
        "training",
        "graphs",
        "head",
        "sampling",
        "fp8",
        "fp8_losses",
    ]
    assert list(by_section) == expected
    assert {row["what"].split(": ")[1] for row in by_section["training"]} == {
        "AR", "Eso-LM alpha_0 = 1", "Eso-LM alpha_0 = 0.25", "MDLM",
    }  # fmt: skip


def test_the_kernels_are_right_before_they_are_fast(rows):
    bounds = {"bfloat16": 0.02, "float32": 1e-5}
    checked = [row for row in rows if row["section"] == "correctness" and "out" in row]
    assert len(checked) == 4  # split and dense; FlexAttention has no backward pass on a CPU
    for row in checked:
        bound = bounds[row["what"].split(", ")[1]]
        assert max(row[name] for name in ("out", "d_query", "d_key", "d_value")) < bound, row


def bench(*arguments):
    """Run the benchmark in this process; return its exit code."""
    with mock.patch.object(sys, "argv", ["bench_gpu", "--smoke", *arguments]):
        with pytest.raises(SystemExit) as stopped:
            bench_gpu.main()
    return stopped.value.code


def test_one_failure_is_reported_and_ends_nothing_but_the_exit_code(tmp_path, capsys):
    def failing(sizes, report):
        raise RuntimeError("no such kernel")

    out = tmp_path / "gpu.json"
    with mock.patch.dict(bench_gpu.SECTIONS, {"head": failing}):
        arguments = ("--section", "head", "--section", "products", "--out", str(out))
        assert bench(*arguments) == 1
    rows = {row["section"]: row for row in json.loads(out.read_text())}
    assert rows["head"]["result"] == "failed: RuntimeError: no such kernel"
    assert rows["products"]["tflops"] > 0
    capsys.readouterr()


def test_results_of_several_calls_are_one_file_unless_the_machine_changed(tmp_path):
    out = tmp_path / "gpu.json"
    for section in ("correctness", "products", "correctness"):
        assert bench("--section", section, "--out", str(out)) == 0
    rows = json.loads(out.read_text())
    sections = [row["section"] for row in rows]
    assert sections == ["machine", *["correctness"] * (len(rows) - 2), "products"]
    assert len({row["what"] for row in rows}) == len(rows)
    rows[0]["device"] = "NVIDIA H100"
    out.write_text(json.dumps(rows))
    assert re.search("another machine .device: NVIDIA H100, now CPU", bench("--out", str(out)))
    assert json.loads(out.read_text()) == rows


def test_a_shape_that_is_not_there_is_refused_with_those_that_are():
    assert bench("--shape", "70B") == "--shape 70B: there are tiny"
    assert bench("--length", "63") == "--length 63: there are 64"


def test_bf16_trains_as_fp32_does(rows):
    losses = next(row for row in rows if row["section"] == "losses")
    assert losses["last_fp32"] < losses["first"]
    assert losses["largest_gap"] < 0.01


@pytest.fixture(scope="module")
def te_rows(tmp_path_factory):
    wheel = released.unpacked("transformer_engine==2.11.0", tmp_path_factory.mktemp("te"))
    out = tmp_path_factory.mktemp("bench") / "results.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment[DPA_RECIPE] = "DelayedScaling"
    command = [sys.executable, "-m", "tests.bench_with_te", wheel, str(out)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {(row["section"], row["what"]): row for row in json.loads(out.read_text())}


def test_fp8_is_measured_where_transformer_engine_is(te_rows):
    speeds = [row for key, row in te_rows.items() if "tokens_per_second" in row]
    gaps = {key[1]: row["mean_gap"] for key, row in te_rows.items() if "mean_gap" in row}
    assert len(speeds) == 6
    assert len(gaps) == 7
    assert gaps.pop("2 steps: BF16, plain layers") == 0
    assert all(0 < gap < 0.005 for gap in gaps.values()), gaps


def test_transformer_engines_attention_is_checked(te_rows):
    bf16, fp8 = (te_rows["correctness", name] for name in ("te, bfloat16", "te, FP8, bfloat16"))
    assert max(bf16[name] for name in ("out", "d_query", "d_key", "d_value")) < 0.02
    assert 0.02 < fp8["out"] < 0.2
