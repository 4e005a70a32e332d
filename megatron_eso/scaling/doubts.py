"""Cells that are finished but did not train as well as their size and their tokens allow.

Whatever goes wrong in training, above all a learning rate that is too high, makes a loss too high, never
too low. So a loss is doubtful if other cells of the same objective show that a lower one was within reach:

smaller  a model of no more weights, after no more tokens, has a clearly lower loss
valley   at the same budget, a smaller and a larger model both have clearly lower losses

No law that is fitted allows either: all fall with weights and with tokens and have one best size at a
budget. One such cell bends a least-squares parabola. How the loss falls is not assumed.

Losses are in nats per token.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

Row = dict[str, Any]
"""A row of a table: column -> value."""
CLEARLY = 0.05
"""A loss is clearly above another if by more than this share; seeds: up to 0.04 (docs/numerics.md)."""
NUM_ERRORS = 2.0  # and by more than so many joint standard errors of the two
ROSE = 0.05  # a training loss has diverged if it ended this share above its lowest level
ABOVE_START = 1.02  # or ended above this many times the first loss, which is that of a guess
FAR_ABOVE_START = 1.1  # or was above this many times the first one for a while
_NOISE = 6.0  # ROSE must also be more than so many standard deviations of a level
_LEAST, _SHARE = 3, 10  # a level goes over a tenth of the logged steps, over three at least


def doubts(rows: Sequence[Row]) -> list[str]:
    """Return for each cell why its loss is doubtful, or an empty string.

    Args:
        rows: finished cells with a loss, of any objectives; see :mod:`megatron_eso.scaling.collect`.
    """
    found = []
    for row in rows:
        better = [o for o in rows if o["objective"] == row["objective"] and _is_clear(row, o)]
        reason = _smaller(row, better) or _valley(row, better)
        found.append(
            f"loss {row['loss']:.4g}, but {reason}: it trained badly, {_cause(row)}"
            if reason
            else ""
        )
    return found


def part(rows: Iterable[Row], reasons: Iterable[str]) -> tuple[list[Row], list[tuple[Row, str]]]:
    """Return the cells that have no reason to be left out, and the others, each with its reason.

    Args:
        rows: cells.
        reasons: one for each cell; empty: it stays.
    """
    judged = list(zip(rows, reasons, strict=True))
    return [row for row, why in judged if not why], [(row, why) for row, why in judged if why]


def why_not_finished(row: Row) -> str:
    """Return why a cell has no loss to fit, or an empty string."""
    if row.get("state") != "finished":
        more = f": {row['remark']}, {_cause(row)}" if row.get("remark") else ""
        return (
            f"state {row.get('state')} at step {row.get('steps_done')} of {row.get('steps')}{more}"
        )
    loss = row.get("loss")
    return "" if isinstance(loss, int | float) and loss == loss else "no validation loss"


def hardly_better_than_unigram(rows: Sequence[Row]) -> list[str]:
    """Return the names of cells whose loss is not clearly below that of token frequencies."""
    return [
        str(row.get("cell"))
        for row in rows
        if row.get("unigram_loss") is not None and row["loss"] > (1 - CLEARLY) * row["unigram_loss"]
    ]


def why_diverged(losses: Sequence[float]) -> str:
    """Return how a training loss diverged, or an empty string; the constants above are the rules.

    A level is the median of a few logged steps in a row, since single steps are outliers where masks are
    drawn. The noise from step to step is measured, so that it does not pass for a rise.

    Args:
        losses: of the logged steps, oldest first.
    """
    size, levels = _levels(losses)
    if not levels:
        return ""
    first, last, low, high = losses[0], levels[-1], min(levels), max(levels)
    if last > ABOVE_START * first:
        return f"its training loss ended at {last:.4g}, above the {first:.4g} that it began with"
    if high > FAR_ABOVE_START * first:
        return f"its training loss rose to {high:.4g}, above the {first:.4g} that it began with"
    steps = [abs(b - a) for a, b in pairwise(losses)]
    # From the median change between two steps, for noise that is normal.
    deviation = 1.4826 * statistics.median(steps) / math.sqrt(2)
    of_level = deviation / math.sqrt(size)
    if last - low > max(ROSE * low, _NOISE * of_level):
        return f"its training loss ended at {last:.4g}, and was {low:.4g} before"
    return ""


def _cause(row: Row) -> str:
    """Return the setting to look at, and how to fit the cell nevertheless."""
    rate = row.get("learning_rate")
    told = "" if rate is None else f" ({rate:.3g} here; learning_rate in the sweep file)"
    return f"most often because of its learning rate{told}; --keep {row.get('cell')} fits it too"


def _levels(losses: Sequence[float]) -> tuple[int, list[float]]:
    """Return how many logged losses a level goes over, and all levels; the first loss is in none."""
    rest = list(losses[1:])
    size = min(len(rest), max(_LEAST, len(rest) // _SHARE))
    ends = range(size, len(rest) + 1) if rest else ()
    return size, [statistics.median(rest[end - size : end]) for end in ends]


def _is_clear(row: Row, other: Row) -> bool:
    """Return whether a cell's loss is clearly above another's."""
    errors = math.hypot(row.get("loss_error") or 0.0, other.get("loss_error") or 0.0)
    return row["loss"] - other["loss"] > max(CLEARLY * other["loss"], NUM_ERRORS * errors)


def _smaller(row: Row, better: Sequence[Row]) -> str:
    no_more = [
        other
        for other in better
        if other["parameters"] <= row["parameters"] and other["tokens"] <= row["tokens"]
    ]
    if not no_more:
        return ""
    other = min(no_more, key=lambda o: o["loss"])
    return (
        f"{other.get('cell')}, with no more weights and tokens ({other['parameters']:.3g} and "
        f"{other['tokens']:.3g} to {row['parameters']:.3g} and {row['tokens']:.3g}), has "
        f"{other['loss']:.4g}"
    )


def _valley(row: Row, better: Sequence[Row]) -> str:
    if row.get("budget") is None:
        return ""
    same = [other for other in better if other.get("budget") == row["budget"]]
    sides = (
        [other for other in same if other["parameters"] < row["parameters"]],
        [other for other in same if other["parameters"] > row["parameters"]],
    )
    if not all(sides):
        return ""
    low, high = (min(side, key=lambda o: o["loss"]) for side in sides)
    return (
        f"at the same budget a smaller model ({low.get('cell')}: {low['loss']:.4g}) and a larger one "
        f"({high.get('cell')}: {high['loss']:.4g}) are both better"
    )
