"""A table of cells becomes the study's conclusions: minima, laws, multipliers, a recommendation.

Cells that diverged, are unfinished or doubtful (doubts.py) take no part and are listed with the reason.
An objective with such cells, or with too few minima, is marked provisional. The fit with the doubtful
cells stands beside the fit without.

Letters: C = training FLOPs, N = weights (embedding and head included), D = data tokens, L = loss in nats
per token; a star marks the best size at a budget.
"""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_eso.errors import ConfigError, DataError
from megatron_eso.scaling.doubts import (
    Row,
    doubts,
    hardly_better_than_unigram,
    part,
    why_not_finished,
)
from megatron_eso.scaling.isoflop import (
    Minimum,
    PowerLaw,
    compute_multiplier,
    minimum_of_budget,
    power_law,
)
from megatron_eso.scaling.parametric import FEWEST_RUNS, Parametric, fit_parametric

NUM_BOOTSTRAP = 400  # samples for the interval of a power law
FAR = 10.0  # times the largest budget with a minimum: an extrapolation beyond that says so
MUST_AGREE = ("data", "vocab_size", "sequence_length")
NUMBERS = ("parameters", "tokens", "flops", "loss")
NEEDED = ("objective", "state", *NUMBERS)


@dataclass(frozen=True)
class ObjectiveFit:
    """Everything fitted for one objective."""

    objective: str
    rows: list[Row]
    """The cells that are fitted."""
    minima: list[Minimum]
    """One for each budget, by rising FLOPs."""
    size_law: PowerLaw | None
    """N* of C; None, as for the next two: fewer than two minima."""
    token_law: PowerLaw | None
    """D* of C."""
    loss_law: PowerLaw | None
    """L* of C."""
    parametric: Parametric | None
    """L of N and D; None: fewer than ``FEWEST_RUNS`` cells."""
    multipliers: list[float]
    """Compute over ar's for the same loss, one for each minimum; empty for ar, and without such laws."""
    provisional: list[str]
    """Reasons not to trust this yet; empty: none known."""
    doubtful: list[Row] = field(default_factory=list)
    """Finished cells that are left out."""
    with_doubtful: "ObjectiveFit | None" = None
    """The fit of these too; None: there are none."""


@dataclass(frozen=True)
class Study:
    """The fits of all objectives, and the cells that are left out."""

    objectives: list[ObjectiveFit]
    left_out: list[tuple[str, str]]
    """Cell and reason."""
    budget: float
    """FLOPs to extrapolate to."""


def fit_study(
    rows: Sequence[Row], *, budget: float | None = None, keep: Sequence[str] = ()
) -> Study:
    """Return all fits of a table of cells.

    Args:
        rows: a table of cells; see :mod:`megatron_eso.scaling.collect`.
        budget: FLOPs to extrapolate to; None: four times the largest budget of a cell that is finished.
        keep: names of cells that take part although they are doubtful or diverged.

    Raises:
        DataError: if columns or numbers are missing, if cells differ in data, vocabulary or row length, or
            if no cell can be used.
        ConfigError: if ``keep`` names what is no cell of the table.
        UserError: if scipy is missing.
    """
    _require_columns(rows)
    _require_cells(rows, keep)
    usable, unfinished = part(rows, (_why_left_out(row, keep) for row in rows))
    if not usable:
        row, why = unfinished[0]
        raise DataError(
            f"none of {len(rows)} cells is finished with a loss; first: {row.get('cell')}, {why}"
        )
    _require_numbers(usable)
    _refuse_mixtures(usable)
    trusted, doubted = part(
        usable,
        (
            "" if str(row.get("cell")) in keep else why
            for row, why in zip(usable, doubts(usable), strict=True)
        ),
    )
    reference = _points(_minima([row for row in trusted if row["objective"] == "ar"]))
    fits = [
        _with_and_without(
            name,
            [row for row in trusted if row["objective"] == name],
            [row for row, _ in doubted if row["objective"] == name],
            reference if name != "ar" else None,
            sum(row["objective"] == name for row, _ in unfinished),
        )
        for name in dict.fromkeys(row["objective"] for row in usable)
    ]
    left_out = [(str(row.get("cell")), why) for row, why in (*unfinished, *doubted)]
    largest = max(float(row.get("budget") or row["flops"]) for row in usable)
    return Study(fits, left_out, budget or 4 * largest)


def recommendation(fit: ObjectiveFit, budget: float) -> str:
    """Return the recommended N and D at a budget in FLOPs, and L there, with 90 % intervals, in one line.

    The power law of L* has no floor E. Far from the measured budgets it is therefore too low, whatever its
    interval says; so the loss by the parametric law stands beside it.
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
    beyond = budget / max(m.budget for m in fit.minima if m.parameters is not None)
    far = f", {beyond:.3g} times the largest budget with a minimum" if beyond > FAR else ""
    mark = " PROVISIONAL" if fit.provisional else ""
    return f"{fit.objective} at {budget:.3g} FLOPs{far}: {', '.join(parts)}{mark}"


def study_text(study: Study) -> str:
    """Return the study as text: the fits of each objective, then the cells that are left out."""
    lines = []
    for fit in study.objectives:
        lines.append(f"{fit.objective}: {len(fit.rows)} runs")
        lines += _laws_text(fit)
        if fit.multipliers:
            low, high = min(fit.multipliers), max(fit.multipliers)
            lines.append(f"  needs {low:.3g} to {high:.3g} times ar's compute for the same loss")
        if fit.size_law and fit.token_law and fit.loss_law:  # else the next line gives the reasons
            lines += [f"  provisional: {reason}" for reason in fit.provisional]
        lines.append(f"  {recommendation(fit, study.budget)}")
        if fit.with_doubtful:
            names = ", ".join(str(row.get("cell")) for row in fit.doubtful)
            lines.append(f"  if {names} took part:")
            lines += [f"  {line}" for line in _laws_text(fit.with_doubtful)]
            lines.append(f"    {recommendation(fit.with_doubtful, study.budget)}")
    lines += [f"left out: {name}: {reason}" for name, reason in study.left_out]
    return "\n".join(lines)


def _laws_text(fit: ObjectiveFit) -> list[str]:
    lines = [f"  {m.budget:.3g} FLOPs: {_minimum_text(m)}" for m in fit.minima]
    for name, law in (("N*", fit.size_law), ("D*", fit.token_law), ("L*", fit.loss_law)):
        if law:
            lines.append(f"  {name} ~ C^{law.exponent:.3f}{_interval_text(law.interval)}")
    return lines + ([f"  {parametric_text(fit.parametric)}"] if fit.parametric else [])


def parametric_text(law: Parametric) -> str:
    """Return the law's five numbers with their intervals in one line."""
    parts = [f"{k} {getattr(law, k):.3g}{_interval_text(law.intervals.get(k))}" for k in "EABab"]
    return "L = E + A/N^a + B/D^b: " + ", ".join(parts)


def _minimum_text(minimum: Minimum) -> str:
    if minimum.parameters is None:
        return f"refused: {minimum.reason}"
    return f"N* {minimum.parameters:.3g}, D* {minimum.tokens:.3g}, loss {minimum.loss:.4f}"


def _interval_text(interval: tuple[float, float] | None) -> str:
    return f" ({interval[0]:.3g} to {interval[1]:.3g})" if interval else ""


def _why_left_out(row: Row, keep: Sequence[str]) -> str:
    is_kept = row.get("state") == "diverged" and str(row.get("cell")) in keep
    return why_not_finished(row | {"state": "finished"} if is_kept else row)


def _require_cells(rows: Sequence[Row], names: Sequence[str]) -> None:
    known = [str(row.get("cell")) for row in rows]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            raise ConfigError(
                f"--keep {name} is no cell of the table"
                + (f"; near: {', '.join(near)}" if near else "")
            )


def _require_columns(rows: Sequence[Row]) -> None:
    missing = [name for name in NEEDED if not all(name in row for row in rows)]
    if missing:
        raise DataError(
            f"the table has no column {', '.join(missing)}; cells.csv of `megatron-eso sweep collect` has: "
            f"{', '.join(NEEDED)}"
        )


def _require_numbers(rows: Sequence[Row]) -> None:
    """Raise for cells with a value that cannot be fitted: most are fitted by their logarithms."""
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
            "finished cells need an objective, and these numbers above 0 and finite: "
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
                "token would not mean the same. Fit them separately"
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


def _with_and_without(
    name: str,
    rows: list[Row],
    doubtful: list[Row],
    reference: tuple[list[float], list[float]] | None,
    num_unfinished: int,
) -> ObjectiveFit:
    """Return the fit of an objective's cells, with that of the doubtful ones too beside it."""
    fit = _fit_objective(name, rows, reference, num_unfinished)
    if not doubtful:
        return fit
    also = _fit_objective(name, [*rows, *doubtful], reference, num_unfinished)
    reasons = [*fit.provisional, f"{len(doubtful)} cell(s) are left out as doubtful"]
    return replace(fit, doubtful=doubtful, with_doubtful=also, provisional=reasons)


def _fit_objective(
    name: str,
    rows: list[Row],
    reference: tuple[list[float], list[float]] | None,
    num_unfinished: int,
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
        reasons.append("a token ladder has no IsoFLOP curves; only the parametric law is fitted")
    elif len(good) < 3:
        reasons.append(f"{len(good)} interior minima; intervals need 3")
    if parametric and not parametric.is_determined:
        reasons.append("the parametric law is at its bounds: these runs do not determine it")
    if num_unfinished:
        reasons.append(f"{num_unfinished} cell(s) diverged or are unfinished")
    idle = hardly_better_than_unigram(rows)
    if idle:
        reasons.append(
            f"{len(idle)} of {len(rows)} cells are hardly better than token frequencies (unigram_loss): "
            + ", ".join(idle)
        )
    return ObjectiveFit(
        name, rows, minima, size_law, token_law, loss_law, parametric, multipliers, reasons
    )


def _law(minima: list[Minimum], key: str) -> PowerLaw | None:
    budgets = [m.budget for m in minima]
    values = [getattr(m, key) for m in minima]
    return power_law(budgets, values, num_bootstrap=NUM_BOOTSTRAP) if minima else None
