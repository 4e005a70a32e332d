"""Logarithmic axes of figures, whose numbers can be read over any range.

Within a decade matplotlib writes every multiple ("3 x 10^5" on "4 x 10^5"), and 6.35 as 6.35 x 10^0.
"""

from typing import Any

FEW_DECADES = 100.0  # up to here 1, 2 and 5 of each decade are written, beyond it the decades alone
FEW_MULTIPLES = 5.0  # up to here a range may hold only one of 1, 2 and 5


def make_logarithmic(axis: Any) -> None:
    """Make an axis of matplotlib logarithmic; call it when what it shows is drawn."""
    from matplotlib.ticker import (
        FuncFormatter,
        LogLocator,
        MaxNLocator,
        NullFormatter,
        ScalarFormatter,
    )

    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    axis.set_minor_formatter(NullFormatter())
    low, high = axis.get_view_interval()
    if high <= FEW_MULTIPLES * low:
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(ScalarFormatter(useOffset=False))
    elif high <= FEW_DECADES * low:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:.3g}"))
