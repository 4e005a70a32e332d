"""A table of cells becomes the study's conclusions: minima, laws, multipliers, a recommendation.

Cells that diverged, stopped or are unfinished take no part and are listed; a conclusion that rests on
too few of them is marked provisional with the reason.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_eso.errors import DataError
from megatron_eso.scaling.isoflop import (
    Minimum,
    PowerLaw,
    compute_multiplier,
    minimum_of_budget,
    power_law,
)
from megatron_eso.scaling.parametric import Parametric, fit_parametric

Row = dict[str, Any]
NUM_BOOTSTRAP = 400
FEWEST_RUNS = 6  # of an objective, for its parametric law of five numbers
FAR = 10.0  # times the largest budget: further than that an extrapolation says so
MUST_AGREE = ("data", "vocab_size", "sequence_length")
NUMBERS = ("parameters", "tokens", "flops", "loss")
NEEDED = ("objective", "state", *NUMBERS)


@dataclass(frozen=True)
class ObjectiveFit:
    """Everything fitted for one objective."""

    objective: str
    rows: list[Row]
    minima: list[Minimum]
    size_law: PowerLaw | None
    token_law: PowerLaw | None
    loss_law: PowerLaw | None
    parametric: Parametric | None
    multipliers: list[float]
    """Compute over the reference objective's for the same loss, at each measured minimum."""
    provisional: list[str]
    """Reasons not to trust this yet; empty: none known."""


@dataclass(frozen=True)
class Study:
    """The fits of all objectives, and cells that were left out with the reason."""

    objectives: list[ObjectiveFit]
    left_out: list[tuple[str, str]]
    budget: float | None


def fit_study(rows: Sequence[Row], *, budget: float | None = None) -> Study:
    """Return all fits of a table of cells.

    Args:
        rows: see :mod:`megatron_eso.scaling.collect`.
        budget: FLOPs to extrapolate to; None: four times the largest measured.

    Raises:
        DataError: if columns or numbers are missing, tokenizers, data or lengths are mixed, or no cell
            can be used.
    """
    _require_columns(rows)
    usable, left_out = [], []
    for row in rows:
        reason = _why_left_out(row)
        if reason:
            left_out.append((str(row.get("cell")), reason))
        else:
            usable.append(row)
    if not usable:
        raise DataError(
            f"none of {len(rows)} cells is finished with a loss; first: {': '.join(left_out[0])}"
        )
    _require_numbers(usable)
    _refuse_mixtures(usable)
    names = list(dict.fromkeys(row["objective"] for row in usable))
    reference = _points(_minima([r for r in usable if r["objective"] == "ar"]))
    fits = [
        _fit_objective(
            name,
            [r for r in usable if r["objective"] == name],
            reference if name != "ar" else None,
            sum(1 for r in rows if r["objective"] == name and _why_left_out(r)),
        )
        for name in names
    ]
    largest = max(float(row.get("budget") or row["flops"]) for row in usable)
    return Study(fits, left_out, budget or 4 * largest)


def recommendation(fit: ObjectiveFit, budget: float) -> str:
    """Return the recommended size and tokens at a budget, with intervals, in one line.

    L* has a power law without the floor E, so far from the measured budgets it is too low, whatever its
    interval says; the parametric law stands beside it.
    """
    if fit.size_law is None or fit.token_law is None or fit.loss_law is None:
        return f"{fit.objective}: no recommendation: {'; '.join(fit.provisional)}"
    parts = []
    for name, law in (("N", fit.size_law), ("D", fit.token_law), ("L", fit.loss_law)):
        interval = law.interval_at(budget)
        shown = f" ({interval[0]:.3g} to {interval[1]:.3g})" if interval else " (no interval)"
        parts.append(f"{name} {law.at(budget):.3g}{shown}")
    if fit.parametric and fit.parametric.is_determined:
        loss = fit.parametric.at(fit.size_law.at(budget), fit.token_law.at(budget))
        parts[-1] += f" by a power law without a floor, {loss:.3g} by E + A/N^a + B/D^b"
    beyond = budget / max(m.budget for m in fit.minima)
    far = f", {beyond:.3g} times the largest budget measured" if beyond > FAR else ""
    mark = " PROVISIONAL" if fit.provisional else ""
    return f"{fit.objective} at {budget:.3g} FLOPs{far}: {', '.join(parts)}{mark}"


def study_text(study: Study) -> str:
    """Return the study for a terminal."""
    lines = []
    for fit in study.objectives:
        lines.append(f"{fit.objective}: {len(fit.rows)} runs")
        for minimum in fit.minima:
            lines.append(f"  {minimum.budget:.3g} FLOPs: {_minimum_text(minimum)}")
        for name, law in (("N*", fit.size_law), ("D*", fit.token_law), ("L*", fit.loss_law)):
            if law:
                lines.append(f"  {name} ~ C^{law.exponent:.3f}{_interval_text(law.interval)}")
        if fit.parametric:
            lines.append(f"  {parametric_text(fit.parametric)}")
        if fit.multipliers:
            low, high = min(fit.multipliers), max(fit.multipliers)
            lines.append(f"  needs {low:.3g} to {high:.3g} times ar's compute for the same loss")
        lines += [f"  provisional: {reason}" for reason in fit.provisional]
        lines.append(f"  {recommendation(fit, study.budget or 0)}")
    lines += [f"left out: {name}: {reason}" for name, reason in study.left_out]
    return "\n".join(lines)


def parametric_text(law: Parametric) -> str:
    """Return the law with its intervals in one line."""
    parts = [f"{k} {getattr(law, k):.3g}{_interval_text(law.intervals.get(k))}" for k in "EABab"]
    return "L = E + A/N^a + B/D^b: " + ", ".join(parts)


def _minimum_text(minimum: Minimum) -> str:
    if minimum.parameters is None:
        return f"refused: {minimum.reason}"
    return f"N* {minimum.parameters:.3g}, D* {minimum.tokens:.3g}, loss {minimum.loss:.4f}"


def _interval_text(interval: tuple[float, float] | None) -> str:
    return f" ({interval[0]:.3g} to {interval[1]:.3g})" if interval else ""


def _why_left_out(row: Row) -> str:
    if row.get("state") != "finished":
        return f"state {row.get('state')} at step {row.get('steps_done')} of {row.get('steps')}"
    loss = row.get("loss")
    return "" if isinstance(loss, int | float) and loss == loss else "no validation loss"


def _require_columns(rows: Sequence[Row]) -> None:
    missing = [name for name in NEEDED if not all(name in row for row in rows)]
    if missing:
        raise DataError(
            f"the table has no column {', '.join(missing)}; cells.csv of `megatron-eso sweep collect` has: "
            f"{', '.join(NEEDED)}"
        )


def _require_numbers(rows: Sequence[Row]) -> None:
    """Raise for cells of which something that is fitted has no logarithm, or is no number."""
    wrong = [
        f"{row.get('cell')}: {name} is {row[name]!r}"
        for row in rows
        for name in (*NUMBERS, *(["budget"] if row.get("budget") is not None else []))
        if not (isinstance(row[name], int | float) and 0 < row[name] < math.inf)
    ]
    wrong += [
        f"{row.get('cell')}: {name} is {row[name]!r}"
        for row in rows
        for name, is_right in (
            ("objective", isinstance(row["objective"], str)),
            ("loss_error", _is_error(row.get("loss_error"))),
        )
        if not is_right
    ]
    if wrong:
        raise DataError(
            "finished cells need an objective and, above 0 and finite, "
            f"{', '.join(NUMBERS)}:\n  - " + "\n  - ".join(wrong[:8])
        )


def _is_error(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and 0 <= value < math.inf)


def _refuse_mixtures(rows: Sequence[Row]) -> None:
    for key in MUST_AGREE:
        values = sorted({str(row.get(key)) for row in rows})
        if len(values) > 1:
            raise DataError(
                f"runs with different {key} cannot share a fit: {', '.join(values[:4])}; losses per "
                "token would not mean the same. Fit them apart"
            )


def _minima(rows: Sequence[Row]) -> list[Minimum]:
    found = []
    rows = [row for row in rows if row.get("budget")]  # a token ladder has none
    for budget in sorted({float(row["budget"]) for row in rows}):
        chosen = [row for row in rows if float(row["budget"]) == budget]
        found.append(
            minimum_of_budget(
                budget,
                [row["parameters"] for row in chosen],
                [row["loss"] for row in chosen],
                [row["tokens"] for row in chosen],
            )
        )
    return found


def _points(minima: list[Minimum]) -> tuple[list[float], list[float]]:
    good = [m for m in minima if m.loss is not None]
    return [m.budget for m in good], [m.loss for m in good if m.loss is not None]


def _fit_objective(
    name: str,
    rows: list[Row],
    reference: tuple[list[float], list[float]] | None,
    num_left_out: int,
) -> ObjectiveFit:
    minima = _minima(rows)
    good = [m for m in minima if m.parameters is not None]
    size_law, token_law, loss_law = (_law(good, key) for key in ("parameters", "tokens", "loss"))
    parametric = None
    if len(rows) >= FEWEST_RUNS:
        columns = ([row[key] for row in rows] for key in ("parameters", "tokens", "loss"))
        parametric = fit_parametric(*columns, num_bootstrap=50)
    multipliers = []
    if reference and len(good) >= 2 and len(reference[0]) >= 2:
        multipliers = compute_multiplier(*_points(minima), *reference)
    reasons = [f"{m.budget:.3g} FLOPs: {m.reason}" for m in minima if m.parameters is None]
    if not minima:
        reasons.append("a token ladder has no IsoFLOP curves; the parametric law alone is fitted")
    elif len(good) < 3:
        reasons.append(f"{len(good)} interior minima; intervals need 3")
    if parametric and not parametric.is_determined:
        reasons.append("the parametric law is at its bounds: these runs do not determine it")
    if num_left_out:
        reasons.append(f"{num_left_out} cells diverged or are unfinished")
    return ObjectiveFit(
        name, rows, minima, size_law, token_law, loss_law, parametric, multipliers, reasons
    )


def _law(minima: list[Minimum], key: str) -> PowerLaw | None:
    budgets = [m.budget for m in minima]
    values = [getattr(m, key) for m in minima]
    return power_law(budgets, values, num_bootstrap=NUM_BOOTSTRAP) if minima else None
