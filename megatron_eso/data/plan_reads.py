"""Where the rows of the next steps lie, worked out for many steps together.

The order, the mixture and the search for a row's shard are vectorized, so they cost little in bulk
and much one step at a time. A block of steps is planned and kept for one set of row numbers, which a rank
asks for at every step. A plan depends only on (step, rows).
"""

from collections import OrderedDict
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_eso.data.fork_lock import ForkLock
from megatron_eso.data.mixture import Mixture
from megatron_eso.data.order import SampleOrder
from megatron_eso.data.shards import ShardedRows

ROWS_OF_BLOCK = 2048  # planned together, over as many steps as they fill
BLOCKS_KEPT = 8

Rows = tuple[int, ...]


class Part(NamedTuple):
    """The rows of one step that one source holds."""

    source: int
    places: list[int]
    """Where they stand among the rows asked for."""
    shards: list[int]
    """Shard of each row; equal ones are side by side."""
    offsets: list[int]
    """Offset of each row, in bytes from the shard's first row."""


class ReadPlans:
    """Plans the reads of a run; several threads may use it."""

    def __init__(
        self,
        orders: list[SampleOrder],
        mixture: Mixture,
        splits: list[ShardedRows],
        *,
        batch_rows: int,
    ) -> None:
        """Keep what plans are made from; nothing is planned yet.

        Args:
            orders: order of each source.
            mixture: which source stands at which place.
            splits: the sources.
            batch_rows: rows of a step on all ranks together.
        """
        self._orders, self._mixture, self._splits = orders, mixture, splits
        self._batch_rows = batch_rows
        self._lock = ForkLock()
        self._blocks: OrderedDict[tuple[int, Rows], list[list[Part]]] = OrderedDict()

    def of_step(self, step: int, rows: Rows) -> list[Part]:
        """Return the reads for some rows of a step.

        Raises:
            ValueError: for rows or steps that do not exist.
        """
        num_steps = max(ROWS_OF_BLOCK // max(len(rows), 1), 1)
        number, within = divmod(step, num_steps)
        block = self._blocks.get((number, rows))
        if block is None:
            block = self._plan(number * num_steps, num_steps, rows)
            with self._lock:
                self._blocks[number, rows] = block
                while len(self._blocks) > BLOCKS_KEPT:
                    self._blocks.popitem(last=False)
        return block[within]

    def samples(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return source and sample number at places of the run's order."""
        sources, in_source = self._mixture.split(places)
        if len(self._orders) == 1:
            return sources, self._orders[0].samples_at(in_source)
        samples = np.empty_like(places)
        for number, order in enumerate(self._orders):
            chosen = sources == number
            if chosen.any():
                samples[chosen] = order.samples_at(in_source[chosen])
        return sources, samples

    def places(self, steps: NDArray[np.int64], rows: Rows) -> NDArray[np.int64]:
        """Return the places [steps, rows] of some rows.

        Raises:
            ValueError: for rows or steps that do not exist.
        """
        numbers = np.array(rows, np.int64)
        is_row = (numbers >= 0) & (numbers < self._batch_rows)
        if steps.min() < 0 or not is_row.all():
            raise ValueError(
                f"rows {rows} from step {steps.min()}: steps begin at 0, rows are 0 to "
                f"{self._batch_rows - 1}"
            )
        return steps[:, None] * self._batch_rows + numbers

    def _plan(self, first: int, num_steps: int, rows: Rows) -> list[list[Part]]:
        places = self.places(np.arange(first, first + num_steps), rows)
        sources, samples = (a.reshape(places.shape) for a in self.samples(places.reshape(-1)))
        shards, offsets = np.empty_like(samples), np.empty_like(samples)
        for number, split in enumerate(self._splits):
            chosen = sources == number
            shards[chosen], offsets[chosen] = split.locate(samples[chosen])
        most = int(shards.max(initial=0)) + 1
        by_shard = np.argsort(sources * most + shards, axis=1, kind="stable")
        in_order = [np.take_along_axis(a, by_shard, 1).tolist() for a in (shards, offsets)]
        places_of = by_shard.tolist()
        if len(self._splits) == 1:  # no sources to separate
            return [[Part(0, *of_step)] for of_step in zip(places_of, *in_order, strict=True)]
        sources_of = np.take_along_axis(sources, by_shard, 1).tolist()
        return [_parts(*of) for of in zip(sources_of, places_of, *in_order, strict=True)]


def _parts(
    sources: list[int], places: list[int], shards: list[int], offsets: list[int]
) -> list[Part]:
    """Return the reads of one step; rows of the same source must be side by side."""
    parts, begin = [], 0
    while begin < len(sources):
        end = begin + sources.count(sources[begin])
        within = slice(begin, end)
        parts.append(Part(sources[begin], places[within], shards[within], offsets[within]))
        begin = end
    return parts
