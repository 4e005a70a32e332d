"""Search, sampling cost, and the command without torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_eso.errors import ConfigError
from megatron_eso.plan.estimate import make_plan
from megatron_eso.plan.hardware import load_hardware
from megatron_eso.plan.report import plan_text, write_chart
from megatron_eso.plan.sampling import cache_bytes_per_row, sampling_costs
from megatron_eso.plan.search import explain, search
from tests.plan.jobs import job

H100 = load_hardware("h100")
ROOT = Path(__file__).parents[2]
BLOCK_TORCH = "import sys; sys.modules['torch'] = None; from megatron_eso.cli.main import main; "


def run_without_torch(*arguments: str) -> str:
    code = BLOCK_TORCH + f"sys.argv = ['megatron-eso', *{list(arguments)!r}]; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_best_layout_fits_and_is_fastest():
    found = search(job().config, 64, H100)
    fitting = [c for c in found if c.memory_bytes <= 80e9]
    assert found[0] is fitting[0]
    assert found[0].time.total == min(c.time.total for c in fitting)


def test_every_found_layout_can_be_planned():
    for candidate in search(job(objective="eso", alpha_0=0.5).config, 64, H100)[:50]:
        make_plan(candidate.job, H100)


def test_losers_are_explained():
    best, *others = search(job().config, 64, H100)
    assert all(
        "slower" in explain(best, c, H100) or "GB" in explain(best, c, H100) for c in others[1:]
    )


def test_a_batch_that_splits_nowhere_is_refused():
    with pytest.raises(ConfigError, match="global_batch_rows"):
        search(job().config, 7 * 11 * 13, H100)


def test_sampling_with_a_cache_needs_two_forwards_a_token_for_eso():
    costs = {c.objective: c for c in sampling_costs(job().config, H100, length=2048)}
    assert costs["eso"].token_forwards == 2 * costs["ar"].token_forwards
    assert costs["mdlm"].token_forwards == 2048 * 2048
    assert costs["mdlm"].seconds > costs["eso"].seconds >= costs["ar"].seconds
    assert cache_bytes_per_row(job().config, 2048) == 2 * 2 * 32 * 4096 * 2048


def test_fewer_calls_make_diffusion_sampling_cheaper():
    many = sampling_costs(job().config, H100, length=2048)
    few = sampling_costs(job().config, H100, length=2048, calls=64)
    by_name = {c.objective: c.seconds for c in many}
    assert all(c.seconds < by_name[c.objective] for c in few if c.objective != "ar")


def test_chart_and_page_are_written(tmp_path):
    plan = make_plan(job(tensor=2, pipeline=2), H100)
    for name in ("plan.png", "plan.html"):
        write_chart(plan, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 10_000
    assert "stage 1" in plan_text(plan)


def test_the_command_runs_without_torch():
    text = run_without_torch("plan", "configs/run/quickstart.yaml", "--gpus", "2", "--json")
    plan = json.loads(text)
    stage = plan["memory_bytes"][0]
    assert stage["total"] == pytest.approx(sum(v for k, v in stage.items() if k != "total"))


@pytest.mark.parametrize(
    "extra", [["--search"], ["--search", "--by", "cost", "--fp8"], ["--sampling", "1024"]]
)
def test_other_questions_run_without_torch(extra):
    assert run_without_torch("plan", "configs/run/quickstart.yaml", "--gpus", "4", *extra)
