"""The range of a single setting, stated where the setting is declared.

``beta1: float = within(0.9, at_least=0, below=1)`` in a configuration's dataclass gives the default
and the range. :func:`out_of_range` finds values outside, :mod:`megatron_eso.config.check` reports them,
and docs/config.md shows the range. Where a setting allows null, null is within every range.
"""

import math
from collections.abc import Iterator
from dataclasses import Field, dataclass, field
from typing import Any

from megatron_eso.config.leaves import leaves


@dataclass(frozen=True)
class Range:
    """An interval of numbers, and a hint to give with a value outside it."""

    at_least: float = -math.inf
    above: float | None = None
    at_most: float = math.inf
    below: float | None = None
    hint: str = ""

    def holds(self, value: float) -> bool:
        """Return whether the value is a number within the interval."""
        return (
            self.at_least <= value <= self.at_most
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """Return the interval in words that can follow "must be"."""
        if self.at_most < math.inf or (self.below is not None and self.below < math.inf):
            left = f"[{self.at_least:g}" if self.above is None else f"({self.above:g}"
            right = f"{self.at_most:g}]" if self.below is None else f"{self.below:g})"
            return f"in {left}, {right}"
        least = f"at least {self.at_least:g}" if self.above is None else f"above {self.above:g}"
        return ("positive" if self.above == 0 else least) + (" and finite" if self.below else "")


def within(default: Any, **bounds: Any) -> Any:
    """Return a dataclass field with this default and a :class:`Range` of these bounds."""
    return field(default=default, metadata={"range": Range(**bounds)})


def range_of(setting: Field) -> Range | None:
    """Return the range with which a dataclass field was declared; None: it has none."""
    return setting.metadata.get("range")


def out_of_range(settings: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the name of each setting outside its range, and a message that says so.

    Args:
        settings: dataclass of a configuration; nested sections and lists of sections are included.
        prefix: put before the names, such as ``cluster.``.
    """
    for name, item, value in leaves(settings, prefix):
        if (allowed := range_of(item)) and value is not None and not allowed.holds(value):
            hint = f"; {allowed.hint}" if allowed.hint else ""
            yield name, f"{name}={value} must be {allowed}{hint}"
