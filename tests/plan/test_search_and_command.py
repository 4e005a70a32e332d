"""Search, sampling cost, and the command without torch."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_eso.cli.plan import app
from megatron_eso.config.check import violations
from megatron_eso.config.load import load_config
from megatron_eso.errors import ConfigError, UserError
from megatron_eso.plan.commands import plan_command, search_command
from megatron_eso.plan.estimate import make_plan
from megatron_eso.plan.hardware import load_hardware
from megatron_eso.plan.report import plan_text, write_chart
from megatron_eso.plan.sampling import cache_bytes_per_row, sampling_costs
from megatron_eso.plan.search import explain, search
from tests.plan.jobs import job, with_model

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


@pytest.mark.parametrize(("objective", "shown"), [("ar", "ar"), ("eso", "eso alpha_0 0.5")])
def test_a_plan_names_alpha_0_only_where_it_counts(objective, shown):
    case = job(objective=objective, alpha_0=0.5)
    first = plan_text(make_plan(case, H100)).splitlines()[0]
    assert f" M parameters, {shown}, 64 x h100" in first


def test_losers_are_explained():
    best, *others = search(job().config, 64, H100)
    assert all(
        "slower" in explain(best, c, H100) or "GB" in explain(best, c, H100) for c in others[1:]
    )


def test_a_search_by_cost_compares_costs():
    """Twice the GPUs take half the time: they are not "-50% slower", they cost more."""
    *lines, use = search_command(
        job().config, 64, H100, by="cost", allow_fp8=False, max_context=1
    ).text.splitlines()
    sizes = {line.split()[0] for line in lines[1:] if "dearer" in line}
    assert len(sizes) > 1 and not any("slower" in line or "-" in line.split("micro-batch")[1]
                                      for line in lines[1:])  # fmt: skip
    assert any("cheaper, but needs" in line for line in lines)
    assert not any("faster" in line for line in lines)
    assert use.startswith(f"use on {lines[1].split()[0]} GPUs: parallel.tensor=")


def test_a_batch_that_splits_nowhere_is_refused():
    with pytest.raises(ConfigError, match="global_batch_rows"):
        search(job().config, 7 * 11 * 13, H100)


QUICKSTART = ROOT / "configs" / "run" / "quickstart.yaml"


def quickstart(*overrides: str):
    return load_config(QUICKSTART, list(overrides))


def ask(*arguments: str) -> str:
    """Run the command in this process, as the program would."""
    done = CliRunner().invoke(app, [*arguments], standalone_mode=False)
    if done.exception:
        raise done.exception
    return done.output


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_heads=0", r"model\.num_heads=0"),
        ("model.num_heads=7", r"not divisible by model\.num_heads"),
        ("parallel.tensor=0", r"parallel\.tensor=0"),
        ("train.micro_batch_rows=0", r"train\.micro_batch_rows=0"),
        ("train.steps=null", "set train.steps or train.tokens"),
    ],
)
def test_what_the_trainer_refuses_is_not_planned(override, message):
    with pytest.raises(ConfigError, match=message):
        plan_command(quickstart(override), 2, H100, None)


@pytest.mark.parametrize("override", ["model.num_heads=0", "model.num_heads=7", "train.steps=null"])
def test_a_search_names_what_no_layout_mends(override):
    with pytest.raises(ConfigError, match=override.split("=")[0].replace(".", r"\.")):
        search(quickstart(override), 2, H100)


def test_every_found_layout_is_one_that_trains():
    config = with_model(job(objective="eso", alpha_0=0.5, cuda_graphs=True), num_layers=4).config
    found = search(config, 64, H100, allow_fp8=True, max_context=4)
    assert found
    for candidate in found:
        assert not violations(candidate.job.config, 64), candidate.name


def test_rules_of_this_machine_do_not_stop_a_plan():
    precision = replace(job().config.precision, fp8="tensorwise", backend="te", attention="te")
    assert plan_command(replace(job().config, precision=precision), 64, H100, None).text


@pytest.mark.parametrize("rows", [6, 12, 48])
def test_the_runs_own_layout_is_tried(rows):
    config = job(objective="eso", alpha_0=0.5, micro=rows, tensor=16, context=2).config
    assert any(c.job.config == config for c in search(config, 64, H100))


def test_max_context_is_the_largest_size_to_try():
    found = search(with_model(job(), num_layers=4).config, 64, H100, max_context=6)
    assert {c.job.config.parallel.context for c in found} == {1, 2, 4}


def test_a_row_count_that_floating_point_misses_can_be_planned():
    config = job(objective="eso", alpha_0=0.5, micro=2).config
    objective = replace(config.objective, diffusion_fraction=0.6)
    config = replace(config, objective=objective, train=replace(config.train, global_batch_rows=90))
    assert config.train.global_batch_rows * 1.4 != 126
    assert plan_command(config, 9, H100, None).data["num_gpus"] == 9


def test_fp8_on_gpus_without_it_is_refused():
    plain = replace(H100, name="a100", fp8_tflops=0.0)
    run = replace(job().config, precision=replace(job().config.precision, fp8="tensorwise"))
    with pytest.raises(ConfigError, match="a100"):
        plan_command(run, 64, plain, None)
    with pytest.raises(ConfigError, match="--fp8"):
        search_command(job().config, 64, plain, by="time", allow_fp8=True, max_context=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "--search", "--chart", "x.png"], "--chart has no effect with --search"),
        (["RUN", "--goodput", "--chart", "x.png"], "--chart has no effect with --goodput"),
        (["RUN", "--fp8"], "--fp8 has no effect"),
        (["RUN", "--max-context", "2", "--goodput"], "--max-context has no effect"),
        (["RUN", "--sampling", "64", "--gpus", "2"], "--gpus has no effect"),
        (["RUN", "--search", "--goodput"], "two questions"),
        (["RUN", "--calibrate", "folder"], "repeat --calibrate"),
        (["RUN", "--sampling", "0"], "--sampling 0"),
        (["RUN", "--sampling=-5"], "--sampling -5"),
        (["RUN", "--gpus", "2", "--chart", "no_such_folder/x.html"], "no_such_folder"),
    ],
)
def test_an_option_that_cannot_be_met_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        ask(*[str(QUICKSTART) if word == "RUN" else word for word in arguments])


@pytest.mark.parametrize("option", ["--gpus", "--max-context"])
def test_a_number_below_one_is_refused(option):
    done = CliRunner().invoke(app, [str(QUICKSTART), "--search", option, "0"])
    assert done.exit_code == 2 and option in done.output


def test_sampling_with_a_cache_needs_two_forwards_a_token_for_eso():
    costs = {c.objective: c for c in sampling_costs(job().config, H100, length=2048)}
    assert costs["eso"].token_forwards == 2 * costs["ar"].token_forwards
    assert costs["mdlm"].token_forwards == 2048 * 2048
    assert costs["mdlm"].seconds > costs["eso"].seconds >= costs["ar"].seconds
    assert cache_bytes_per_row(job().config, 2048) == 2 * 2 * 32 * 4096 * 2048


def test_sampling_takes_what_it_took_on_an_h200():
    """124M, one token per step, from CUDA graphs (docs/performance.md); MDLM's passes are less small."""
    shape = ["model.hidden_size=768", "model.num_layers=12", "model.num_heads=12", "train.steps=1"]
    config = load_config(None, [*shape, "model.vocab_size=50258", "train.sequence_length=1024"])
    measured = {2048: {"eso": 2.45, "ar": 2.41, "mdlm": 4.75}, 8192: {"eso": 11.3, "ar": 10.4}}
    for length, seconds in measured.items():
        costs = {
            c.objective: c for c in sampling_costs(config, load_hardware("h200"), length=length)
        }
        for name, value in seconds.items():
            assert costs[name].seconds == pytest.approx(
                value, rel=0.2 if name == "mdlm" else 0.1
            ), (length, name)


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
    "extra",
    [
        ["--gpus", "4", "--search"],
        ["--gpus", "4", "--search", "--by", "cost", "--fp8"],
        ["--gpus", "2", "--goodput"],
        ["--sampling", "1024"],
    ],
)
def test_other_questions_run_without_torch(extra):
    assert run_without_torch("plan", "configs/run/quickstart.yaml", *extra)
