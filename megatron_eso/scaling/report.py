"""The study as one self-contained HTML page with a figure, which is also written as PNG and SVG."""

import base64
import html
import io
from pathlib import Path
from typing import Any

import numpy as np

from megatron_eso.errors import UserError
from megatron_eso.files import write_figure, write_whole
from megatron_eso.log_axis import make_logarithmic
from megatron_eso.scaling.isoflop import parabola
from megatron_eso.scaling.parametric import FEWEST_RUNS
from megatron_eso.scaling.study import ObjectiveFit, Study, recommendation, study_text

STYLE = (
    "body{font-family:sans-serif;max-width:80em;margin:2em auto;padding:0 1em}table{border-collapse:"
    "collapse}td,th{padding:.2em .7em;border-bottom:1px solid #ddd;text-align:right}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}pre{background:#f6f6f6;"
    "padding:1em;overflow:auto}"
)
MANY = 1e9  # whole numbers from here on are rounded like others
COLUMNS = ("cell", "parameters", "tokens", "flops", "flops_published", "loss", "loss_error",
           "train_loss", "learning_rate", "state")  # fmt: skip


def write_report(study: Study, out: Path, *, note: str = "") -> list[Path]:
    """Write ``out`` (.html) and the figure beside it; return the paths.

    Args:
        study: the fits.
        out: the page.
        note: text for the top of the page; empty lines part its paragraphs.

    Raises:
        UserError: if matplotlib is missing, ``out`` is no .html name, or its folder cannot be made.
    """
    require_page(out)
    figure = study_figure(study)
    paths = [out.with_suffix(".png"), out.with_suffix(".svg")]
    for path in paths:
        write_figure(path, figure, dpi=100)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100, format="png")
    write_whole(out, _page(study, base64.b64encode(buffer.getvalue()).decode(), note))
    return [out, *paths]


def require_page(out: Path) -> None:
    """Make the folder of the page.

    Raises:
        UserError: if ``out`` is no .html name or is a folder, or its folder cannot be made.
    """
    if out.suffix != ".html":
        raise UserError(f"--out {out}: the name must end in .html")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name a file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: its folder cannot be made: {error}") from None


def study_figure(study: Study) -> Any:
    """Return the matplotlib figure: curves of each objective, N* and L* over budget, residuals.

    It has two rows. The curves fill the upper one; a single objective shares it with N*.

    Raises:
        UserError: if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("reports need matplotlib: pip install -e '.[plots]'") from None
    number = len(study.objectives)
    first = max(2, number)
    second = number + 3 - first
    figure: Any = Figure(figsize=(5 * max(first, second), 9), layout="constrained")
    above, below = figure.subfigures(2, 1)
    axes = [*above.subplots(1, first), *below.subplots(1, second)]
    for axis, fit in zip(axes, study.objectives, strict=False):
        (_draw_isoflop if fit.minima else _draw_ladder)(axis, fit)
    _draw_law(axes[number], study, "size_law", "parameters", "N*, parameters")
    _draw_law(axes[number + 1], study, "loss_law", "loss", "frontier: L*, nats per token")
    _draw_residuals(axes[number + 2], study)
    return figure


def _draw_isoflop(axis: Any, fit: ObjectiveFit) -> None:
    for index, minimum in enumerate(fit.minima):
        chosen = sorted(
            (row["parameters"], row["loss"], row.get("loss_error") or 0.0)
            for row in fit.rows
            if float(row.get("budget") or 0) == minimum.budget
        )
        sizes = np.array([size for size, _, _ in chosen])
        color = f"C{index}"
        axis.errorbar(sizes, [y for _, y, _ in chosen], yerr=[e for _, _, e in chosen], fmt="o",
                      color=color, markersize=4, label=f"{minimum.budget:.2g} FLOPs")  # fmt: skip
        if minimum.coefficients:
            line = np.geomspace(sizes.min(), sizes.max(), 60)
            axis.plot(line, parabola(minimum.coefficients, line), color=color)
            axis.plot(minimum.parameters, minimum.loss, "*", color=color, markersize=14)
        else:
            axis.plot(sizes, [y for _, y, _ in chosen], ":", color=color)
    if fit.doubtful:
        axis.plot([row["parameters"] for row in fit.doubtful], [row["loss"] for row in fit.doubtful],
                  "x", color="black", label="left out: doubtful")  # fmt: skip
    refused = "" if all(m.coefficients for m in fit.minima) else "  (dotted: minimum refused)"
    axis.set(xlabel="parameters", ylabel="validation nats per token", title=fit.objective + refused)
    make_logarithmic(axis.xaxis)
    axis.legend(fontsize=8)


def _draw_ladder(axis: Any, fit: ObjectiveFit) -> None:
    errors = [row.get("loss_error") or 0.0 for row in fit.rows]
    axis.errorbar([row["flops"] for row in fit.rows], [row["loss"] for row in fit.rows], yerr=errors,
                  fmt="o", markersize=4)  # fmt: skip
    axis.set(xlabel="training FLOPs", ylabel="validation nats per token",
             title=f"{fit.objective}  (token ladder)")  # fmt: skip
    make_logarithmic(axis.xaxis)


def _draw_law(axis: Any, study: Study, law_name: str, value: str, label: str) -> None:
    for index, fit in enumerate(study.objectives):
        good = [m for m in fit.minima if m.parameters is not None]
        law = getattr(fit, law_name)
        axis.plot([m.budget for m in good], [getattr(m, value) for m in good], "o", color=f"C{index}",
                  label=fit.objective if good else None)  # fmt: skip
        if law:
            line = np.geomspace(min(m.budget for m in good), study.budget, 30)
            axis.plot(line, [law.at(x) for x in line], color=f"C{index}")
            if law.samples:
                band = np.array([law.interval_at(x) for x in line])
                axis.fill_between(line, band[:, 0], band[:, 1], color=f"C{index}", alpha=0.15)
    axis.set(xlabel="training FLOPs", ylabel=label)
    if axis.get_legend_handles_labels()[0]:
        make_logarithmic(axis.xaxis)
        make_logarithmic(axis.yaxis)
        axis.legend(fontsize=8)
    else:
        _say_empty(axis, "no interior minimum")


def _draw_residuals(axis: Any, study: Study) -> None:
    for index, fit in enumerate(study.objectives):
        if fit.parametric:
            axis.plot([row["flops"] for row in fit.rows], 100 * np.array(fit.parametric.residuals),
                      "o", color=f"C{index}", markersize=4, label=fit.objective)  # fmt: skip
    axis.set(xlabel="training FLOPs", ylabel="measured over fitted loss, %",
             title="residuals of E + A/N^a + B/D^b")  # fmt: skip
    if axis.get_legend_handles_labels()[0]:
        axis.axhline(0, color="black", linewidth=0.8)
        make_logarithmic(axis.xaxis)
        axis.legend(fontsize=8)
    else:
        _say_empty(axis, f"fewer than {FEWEST_RUNS} runs: not fitted")


def _say_empty(axis: Any, why: str) -> None:
    """Say in an empty axis why it is empty, and take its numbers away: they would mean nothing."""
    axis.set(xticks=[], yticks=[])
    axis.text(0.5, 0.5, why, ha="center", transform=axis.transAxes)


def _page(study: Study, picture: str, note: str) -> str:
    rows = [
        row
        for fit in study.objectives
        for row in (*fit.rows, *(row | {"state": "left out: doubtful"} for row in fit.doubtful))
    ]
    head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_cell(row.get(c)))}</td>" for c in COLUMNS) + "</tr>"
        for row in rows
    )
    advice = "".join(
        f"<li>{html.escape(recommendation(fit, study.budget))}</li>" for fit in study.objectives
    )
    note_html = "".join(
        f"<p>{html.escape(part)}</p>" for part in note.split("\n\n") if part.strip()
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Scaling study</title>"
        f"<style>{STYLE}</style><h1>Scaling study</h1>{note_html}<h2>Recommendation</h2>"
        f"<ul>{advice}</ul><img alt='IsoFLOP curves, laws and residuals' "
        f"src='data:image/png;base64,{picture}'><h2>Fits</h2><pre>{html.escape(study_text(study))}"
        f"</pre><h2>Cells</h2><table><tr>{head}</tr>{body}</table></html>"
    )


def _cell(value: Any) -> str:
    is_short = isinstance(value, float) or (isinstance(value, int) and value >= MANY)
    return f"{value:.5g}" if is_short else str(value if value is not None else "")
