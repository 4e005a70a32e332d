"""Which sample of which source is the i-th of a run: a pure function, so resume needs only i.

A mixture repeats a pattern of slots in which every source has its share, evenly spread; the n-th slot of
a source reads the n-th sample of that source's own endless sequence of shuffled epochs.
"""

from dataclasses import dataclass, field

import numpy as np

from megatron_eso.data.streaming_shim import shuffled_order
from megatron_eso.errors import DataError

_PATTERN = 1000  # slots; weights are exact to a thousandth


@dataclass
class EpochOrder:
    """One source's endless sequence of samples."""

    shard_sizes: np.ndarray
    seed: int
    shuffle: bool
    block_size: int
    canonical_nodes: int
    _epochs: dict[int, np.ndarray] = field(default_factory=dict)

    def samples(self, places: np.ndarray) -> np.ndarray:
        """Return the sample at each place of the sequence."""
        size = int(self.shard_sizes.sum())
        if not self.shuffle:
            return places % size
        out = np.empty_like(places)
        for epoch in np.unique(places // size):
            here = places // size == epoch
            out[here] = self._epoch(int(epoch))[places[here] % size]
        return out

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            for old in [e for e in self._epochs if e < epoch - 1]:
                del self._epochs[old]
            self._epochs[epoch] = shuffled_order(
                self.shard_sizes,
                canonical_nodes=self.canonical_nodes,
                seed=self.seed,
                epoch=epoch,
                block_size=self.block_size,
            )
        return self._epochs[epoch]


@dataclass(frozen=True)
class Mixture:
    """Which source each place of the run reads, and which place of that source."""

    pattern: np.ndarray
    """Source of each slot of the pattern."""
    rank: np.ndarray
    """How many earlier slots of the pattern have the same source."""
    counts: np.ndarray
    """Slots of each source in the pattern."""

    @staticmethod
    def from_weights(weights: list[float]) -> "Mixture":
        """Return the mixture of sources with these relative weights.

        Raises:
            DataError: if a weight is not positive or too small to get a slot.
        """
        if not weights or min(weights) <= 0:
            raise DataError(f"data.sources weights must be positive, not {weights}")
        length = _PATTERN if len(weights) > 1 else 1
        exact = np.array(weights) / sum(weights) * length
        counts = np.floor(exact).astype(np.int64)
        for index in np.argsort(counts - exact, kind="stable")[: length - counts.sum()]:
            counts[index] += 1
        if counts.min() == 0:
            raise DataError(f"a data source has less than 1/{length} of the mixture: {weights}")
        spread = [((k + 0.5) / n, s) for s, n in enumerate(counts) for k in range(n)]
        pattern = np.array([source for _, source in sorted(spread)])
        rank = np.array([(pattern[:i] == s).sum() for i, s in enumerate(pattern)])
        return Mixture(pattern, rank, counts)

    def place(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (source, place in that source) of each sample of the run."""
        slot, round_ = indices % len(self.pattern), indices // len(self.pattern)
        source = self.pattern[slot]
        return source, round_ * self.counts[source] + self.rank[slot]
