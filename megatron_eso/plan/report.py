"""A plan as a table for the terminal, as a chart (PNG or SVG), and as one HTML page with both."""

import base64
import html
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_eso.errors import UserError
from megatron_eso.files import write_figure, write_whole
from megatron_eso.plan.calibrate import Calibration
from megatron_eso.plan.estimate import Plan
from megatron_eso.plan.goodput import Failures, best_interval, expected_share, simulate
from megatron_eso.plan.parameters import num_parameters
from megatron_eso.plan.sampling import SamplingCost

KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "workspace")


def plan_text(plan: Plan) -> str:
    """Return the plan as lines for a terminal."""
    job, config = plan.job, plan.job.config
    parallel, objective = config.parallel, config.objective
    share = f" alpha_0 {objective.alpha_0:g}" if objective.name == "eso" else ""
    lines = [
        f"{config.name}: {num_parameters(config.model) / 1e6:,.1f} M parameters, "
        f"{objective.name}{share}, {job.num_gpus} x {plan.hardware.name}, tp "
        f"{parallel.tensor} pp {parallel.pipeline} vp {parallel.virtual_pipeline} cp "
        f"{parallel.context} dp {job.data_parallel}, {job.num_micro_batches:g} micro-batches",
        "",
        "memory per GPU, GB   " + "".join(f"{kind:>13}" for kind in (*KINDS, "total")),
    ]
    for stage, memory in enumerate(plan.memory):
        values = [getattr(memory, kind) for kind in KINDS] + [memory.total]
        lines.append(f"  stage {stage:<13}" + "".join(f"{value / 1e9:13.2f}" for value in values))
    lines += ["", f"step {plan.time.total:.4g} s"]
    for name, seconds in sorted(vars(plan.time).items(), key=lambda item: -item[1]):
        if seconds > 0:
            share = seconds / plan.time.total
            bar = "#" * round(40 * share)
            lines.append(f"  {name.replace('_', ' '):<18}{seconds:11.4g} s {share:6.1%} {bar}")
    lines += [
        "",
        f"{plan.tokens_per_second:,.0f} tokens/s; {plan.mfu:.1%} of the 16-bit peak (causal attention "
        f"as computed), {plan.mfu_full_attention:.1%} (all pairs counted)",
        f"effective training time under failures {plan.goodput:.1%} with a save every "
        f"{seconds_text(plan.failures.interval_seconds)}; "
        f"{plan.days:,.2f} days, {plan.dollars:,.0f} dollars to the budget",
    ]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in plan.warnings)])


def seconds_text(seconds: float) -> str:
    """Return a time for people: fractions only of short ones."""
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.3g} s"


def goodput_text(failures: Failures, *, days: float = 60.0) -> str:
    """Return formula and simulation for growing clusters, each at its own best save interval.

    The stall shrinks as the cluster grows, since each GPU copies a smaller share of the model.
    """
    copied = failures.save_stall_seconds * failures.num_gpus
    lines = ["   GPUs  best save interval  formula  simulated  failures/day  lost  down"]
    for num_gpus in (1024, 2048, 4096, 8192, 16384, 32768, 65536, 100000):
        case = replace(
            failures,
            num_gpus=num_gpus,
            save_stall_seconds=copied / num_gpus,
            save_interval_seconds=None,
        )
        result = simulate(case, days=days)
        wall = days * 86400
        lines.append(
            f"{num_gpus:>7}  {best_interval(case):>16.0f} s  {expected_share(case):>7.1%}  "
            f"{result.share:>9.1%}  {result.num_failures / days:>12.2f}  "
            f"{result.lost_seconds / wall:>4.1%}  {result.down_seconds / wall:>4.1%}"
        )
    return "\n".join(lines)


def sampling_text(costs: list[SamplingCost]) -> str:
    """Return the sampling costs as a table."""
    lines = ["objective  network calls  token-forwards  cache MB   seconds  bound by"]
    for cost in costs:
        lines.append(
            f"{cost.objective:<9}  {cost.network_calls:>13,.0f}  {cost.token_forwards:>14,.0f}  "
            f"{cost.cache_bytes / 1e6:>8,.1f}  {cost.seconds:>8.2f}  {cost.bound_by}"
        )
    return "\n".join(lines)


def calibration_text(result: Calibration) -> str:
    """Return the fitted constants (as YAML for a profile) and the errors of every run."""
    lines = ["constants:"]
    lines += [f"  {name}: {value:.5g}" for name, value in vars(result.constants).items()]
    lines += ["", f"{'run':<40}{'measured s':>12}{'fit':>8}{'left out':>10}"]
    for fitted, left_out in zip(result.fitted, result.left_out, strict=True):
        lines.append(
            f"{fitted.name[-39:]:<40}{fitted.measured_seconds:>12.4g}{fitted.error:>+8.1%}"
            f"{left_out.error:>+10.1%}"
        )
    lines.append(
        f"leave-one-out: mean {result.mean_error:.1%}, worst {result.worst_error:.1%}; constants hold "
        "for this software stack and these precisions only"
    )
    return "\n".join(lines)


def write_chart(plan: Plan, path: Path) -> None:
    """Write memory by stage and step time by part: PNG or SVG by suffix, or a page for .html.

    Raises:
        UserError: for another suffix, or a path that cannot be written.
    """
    try:
        _write_chart(plan, path)
    except OSError as error:
        raise UserError(
            f"--chart {path} cannot be written: {error.strerror}; name a file in a folder that exists"
        ) from None


def _write_chart(plan: Plan, path: Path) -> None:
    if path.suffix == ".html":
        buffer = io.BytesIO()
        _figure(plan).savefig(buffer, dpi=110, format="png")
        picture = base64.b64encode(buffer.getvalue()).decode()
        write_whole(
            path,
            f"<!doctype html><meta charset=utf-8><title>Plan of {html.escape(plan.job.config.name)}"
            f"</title><body style='font-family:sans-serif;max-width:75em;margin:2em auto'>"
            f"<h1>Plan of {html.escape(plan.job.config.name)}</h1>"
            f"<img style='max-width:100%' alt='memory and step time' "
            f"src='data:image/png;base64,{picture}'>"
            f"<pre>{html.escape(plan_text(plan))}</pre>",
        )
        return
    if path.suffix not in (".png", ".svg"):
        raise UserError(f"--chart {path}: the name must end in .png, .svg or .html")
    write_figure(path, _figure(plan), dpi=110)


def _figure(plan: Plan) -> Any:  # matplotlib is optional
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("charts need matplotlib: pip install -e '.[plots]'") from None
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    stages, bottom = range(len(plan.memory)), [0.0] * len(plan.memory)
    for kind in KINDS:
        values = [getattr(stage, kind) / 1e9 for stage in plan.memory]
        left.bar(stages, values, bottom=bottom, label=kind)
        bottom = [b + v for b, v in zip(bottom, values, strict=True)]
    left.axhline(plan.hardware.memory_gb, color="black", linestyle="--", label="GPU memory")
    left.set(
        xlabel="pipeline stage", ylabel="GB per GPU", title="Memory by kind", xticks=list(stages)
    )
    left.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    parts = sorted((v, n.replace("_", " ")) for n, v in vars(plan.time).items() if v > 0)
    bars = right.barh([name for _, name in parts], [value for value, _ in parts])
    right.bar_label(bars, [f"{v / plan.time.total:.1%}" for v, _ in parts], padding=3, fontsize=8)
    right.set(xlabel="seconds", title=f"Step: {plan.time.total:.3g} s, MFU {plan.mfu:.1%}")
    right.set_xlim(0, 1.15 * parts[-1][0])
    return figure
