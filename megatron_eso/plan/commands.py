"""What ``megatron-eso plan`` does: one function per kind of question, text and data together."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_eso.config.check import check
from megatron_eso.config.load import load_config
from megatron_eso.config.schema import RunConfig
from megatron_eso.errors import ConfigError
from megatron_eso.plan import report
from megatron_eso.plan.calibrate import calibrate
from megatron_eso.plan.estimate import best_save_every_steps, make_plan, run_failures
from megatron_eso.plan.goodput import (
    best_interval,
    expected_share,
    simulate,
    what_it_is_worth,
)
from megatron_eso.plan.hardware import Hardware, constants_dict
from megatron_eso.plan.job import Job, require_trainable
from megatron_eso.plan.measured import read_measured
from megatron_eso.plan.sampling import sampling_costs
from megatron_eso.plan.search import Candidate, explain, price, search
from megatron_eso.plan.step_time import step_time

SHOWN = 10


@dataclass(frozen=True)
class Answer:
    """An answer for people and for programs."""

    text: str
    data: Any


def load_run(path: Path | None, overrides: list[str] | None) -> RunConfig:
    """Return the run configuration.

    Raises:
        ConfigError: if no file was named.
    """
    if path is None:
        raise ConfigError("name a run configuration, e.g. configs/run/quickstart.yaml")
    return load_config(path, overrides)


def plan_command(run: RunConfig, gpus: int, hardware: Hardware, chart: Path | None) -> Answer:
    """Return memory, time and cost of the run as configured."""
    job = _job(run, gpus, hardware)
    plan = make_plan(job, hardware)
    text = report.plan_text(plan)
    if chart:
        report.write_chart(plan, chart)
        text += f"\nchart: {chart}"
    return Answer(text, plan.as_dict())


def search_command(
    run: RunConfig, gpus: int, hardware: Hardware, *, by: str, allow_fp8: bool, max_context: int
) -> Answer:
    """Return the best layouts by time on all GPUs, or by cost over smaller numbers of GPUs too."""
    if by not in ("time", "cost"):
        raise ConfigError(f"--by {by}: choose time or cost")
    _require_fp8(allow_fp8, "--fp8", hardware)
    _require_fp8(run.precision.fp8 != "off", f"precision.fp8={run.precision.fp8}", hardware)
    numbers = [gpus]
    while by == "cost" and numbers[-1] % 2 == 0 and numbers[-1] > 1:
        numbers.append(numbers[-1] // 2)
    found: list[Candidate] = []
    for number in numbers:
        try:
            found += search(run, number, hardware, max_context=max_context, allow_fp8=allow_fp8)
        except ConfigError:
            if number == gpus:
                raise
    limit = hardware.memory_gb * 1e9
    fitting = [c for c in found if c.memory_bytes <= limit]
    overflowing = sorted((c for c in found if c.memory_bytes > limit), key=lambda c: c.memory_bytes)
    if not fitting:
        need = overflowing[0]
        raise ConfigError(
            f"none of {len(found)} layouts fits in {hardware.memory_gb:g} GB on {gpus} GPUs; the "
            f"smallest ({need.name}) needs {need.memory_bytes / 1e9:.0f} GB: use more GPUs"
        )
    fitting.sort(key=lambda c: price(c, by))
    best = fitting[0]
    lines = [f"{len(found)} layouts, {len(fitting)} fit; best by {by}:"]
    for candidate in fitting[:SHOWN]:
        why = "best" if candidate is best else explain(best, candidate, hardware, by=by)
        lines.append(
            f"  {candidate.job.num_gpus:>6} GPUs  {candidate.time.total:9.4g} s  "
            f"{candidate.memory_bytes / 1e9:5.1f} GB  {candidate.name:<58} {why}"
        )
    # Users ask about layouts that would be better if they fitted.
    better = [c for c in overflowing if price(c, by) < price(best, by)]
    for candidate in sorted(better, key=lambda c: price(c, by))[:3]:
        lines.append(
            f"  {candidate.job.num_gpus:>6} GPUs  {candidate.time.total:9.4g} s  "
            f"{candidate.memory_bytes / 1e9:5.1f} GB  {candidate.name:<58} "
            f"{'cheaper' if by == 'cost' else 'faster'}, but {explain(best, candidate, hardware)}"
        )
    lines.append(f"use on {best.job.num_gpus} GPUs: " + " ".join(best.settings()))
    return Answer("\n".join(lines), [_candidate_dict(c) for c in fitting[:SHOWN]])


def goodput_command(run: RunConfig, gpus: int, hardware: Hardware) -> Answer:
    """Return the run's share of training time under failures, at this size and at growing sizes."""
    job = _job(run, gpus, hardware)
    step_seconds = step_time(job, hardware).total
    failures = run_failures(job, hardware, step_seconds)
    every = best_save_every_steps(job, failures, step_seconds)
    best = replace(failures, save_interval_seconds=every * step_seconds)
    worth = what_it_is_worth(failures)
    result = simulate(failures)
    text = [
        f"{gpus} GPUs, a save every {report.seconds_text(failures.interval_seconds)} of training that "
        f"stalls {failures.save_stall_seconds:.2g} s: effective training time "
        f"{expected_share(failures):.1%} by formula, {result.share:.1%} simulated",
        f"best: a save every {report.seconds_text(best.interval_seconds)} "
        f"(train.save_every_steps={every}): {expected_share(best):.1%} by formula",
        "worth in points of training time: "
        + ", ".join(f"{name} {points:+.2f}" for name, points in worth.items()),
        "",
        report.goodput_text(failures),
    ]
    data = {
        "assumptions": asdict(failures),
        "best_interval_seconds": best_interval(failures),
        "best_save_every_steps": every,
        "best_formula": expected_share(best),
        "formula": expected_share(failures),
        "simulated": asdict(result),
        "worth_points": worth,
    }
    return Answer("\n".join(text), data)


def sampling_command(run: RunConfig, hardware: Hardware, length: int) -> Answer:
    """Return sampling costs of every objective at a length."""
    check(run)
    costs = sampling_costs(run, hardware, length=length)
    return Answer(report.sampling_text(costs), [asdict(cost) for cost in costs])


def calibrate_command(paths: list[Path], hardware: Hardware) -> Answer:
    """Return constants fitted to measured runs with their errors."""
    runs = [run for path in paths for run in read_measured(path)]
    result = calibrate(runs, hardware)
    data = {
        "constants": constants_dict(result.constants),
        "mean_error": result.mean_error,
        "worst_error": result.worst_error,
        "left_out": {row.name: row.error for row in result.left_out},
    }
    return Answer(report.calibration_text(result), data)


def _job(run: RunConfig, gpus: int, hardware: Hardware) -> Job:
    """Return the run on its GPUs, if the trainer would accept it."""
    job = Job(run, gpus)
    require_trainable(job)
    _require_fp8(run.precision.fp8 != "off", f"precision.fp8={run.precision.fp8}", hardware)
    return job


def _require_fp8(is_asked: bool, what: str, hardware: Hardware) -> None:
    if is_asked and not hardware.fp8_tflops:
        raise ConfigError(
            f"{what}: the GPUs of --cluster {hardware.name} have no FP8 (fp8_tflops: 0)"
        )


def _candidate_dict(candidate: Candidate) -> dict[str, Any]:
    return {
        "num_gpus": candidate.job.num_gpus,
        "settings": candidate.settings(),
        "step_seconds": asdict(candidate.time) | {"total": candidate.time.total},
        "memory_bytes": candidate.memory_bytes,
    }
