"""Which rank is slow: percentiles of each rank's own time in a step, compared across ranks.

A step takes equally long on every rank, since ranks wait for each other. Two times are a rank's own:
from its rows to the end of its passes (before gradients are reduced; model-parallel ranks still share
it), and, on a CPU, the processor time it used.
"""

import logging
import statistics
import time
from typing import Any

import torch.distributed as dist

from megatron_eso.train.step import StepReport

log = logging.getLogger(__name__)
_SLOW = 1.2  # a rank is named if its median exceeds the median over ranks by this factor


class Stragglers:
    """Collects this rank's times; every ``every`` steps all ranks exchange percentiles."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._passes: list[float] = []
        self._busy: list[float] = []
        self._processor = time.process_time()

    def add(self, report: StepReport) -> dict[str, float] | None:
        """Take in a step; return scalars for TensorBoard if a report is due, else None."""
        now = time.process_time()
        self._passes.append(report.seconds["own_passes"])
        self._busy.append(now - self._processor)
        self._processor = now
        if not self._every or len(self._passes) < self._every:
            return None
        mine = {"passes": _percentiles(self._passes), "processor": _percentiles(self._busy)}
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, mine)
        self._passes, self._busy = [], []
        if dist.get_rank() == 0:
            for line in describe(everywhere):
                log.info(line)
        return {
            f"stragglers/{kind}_{name}_seconds/rank_{rank}": value
            for rank, found in enumerate(everywhere)
            for kind, values in found.items()
            for name, value in values.items()
        }


def describe(everywhere: list[dict[str, dict[str, float]]]) -> list[str]:
    """Return the report's lines: the spread over ranks, and every slow rank."""
    lines = []
    for kind in ("passes", "processor"):
        medians = [found[kind]["p50"] for found in everywhere]
        middle = statistics.median(medians)
        slowest = max(range(len(medians)), key=medians.__getitem__)
        text = (
            f"stragglers, {kind}: median of ranks {middle:.3f} s, slowest rank {slowest} "
            f"{medians[slowest]:.3f} s (p90 {everywhere[slowest][kind]['p90']:.3f}, "
            f"max {everywhere[slowest][kind]['max']:.3f})"
        )
        slow = [rank for rank, value in enumerate(medians) if value > _SLOW * middle]
        if slow:
            text += f"; SLOW: rank {', '.join(map(str, slow))}"
        lines.append(text)
    return lines


def _percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "p50": statistics.median(ordered),
        "p90": ordered[int(0.9 * (len(ordered) - 1))],
        "max": ordered[-1],
    }
