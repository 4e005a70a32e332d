"""Which sample stands at each place of a data set's endless order: a pure function, without a table.

An epoch is streaming's ``py1e`` permutation of the shards' samples. Streaming permutes a whole epoch in one
go, which costs seconds and gigabytes at 50 million samples. So larger data sets are cut into *groups* of
about GROUP_SAMPLES samples: the epoch's shuffled shards are dealt out in order, and ``py1e`` permutes each
group on its own. A data set of one group has exactly streaming's order. Epochs follow each other without
a gap, so every sample is used once per epoch, whatever the batch.
"""

import hashlib
import warnings
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_eso.data import streaming_shim
from megatron_eso.data.fork_lock import ForkLock
from megatron_eso.errors import DataError

# A group costs about 0.1 s and 12 MB; shards of 64 MiB have far fewer samples.
GROUP_SAMPLES = 1 << 20
GROUPS_KEPT = 3
FINGERPRINT_SAMPLES = 4096
_EPOCH_STREAM = 0x5EED  # keeps the deal of shards apart from other uses of (seed, epoch)


class SampleOrder:
    """The order of one data set's samples, for all epochs."""

    def __init__(
        self,
        shard_sizes: Sequence[int],
        *,
        seed: int,
        shuffle: bool = True,
        block_size: int = 1 << 18,
        nodes: int = 1,
        group_samples: int = GROUP_SAMPLES,
    ) -> None:
        """Describe the order; nothing is computed yet.

        Args:
            shard_sizes: samples of each shard, in written order.
            seed: seed of the run's data order.
            shuffle: False: the written order in every epoch.
            block_size: number of samples of neighboring shards that are shuffled together.
            nodes: independent shard sequences of ``py1e`` (canonical nodes).
            group_samples: about how many samples are permuted together.

        Raises:
            DataError: if there are no samples, or more canonical nodes than samples in a group.
        """
        self.num_samples = int(sum(shard_sizes))
        self._sizes = np.array(shard_sizes, np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)])
        self._seed, self._shuffle = seed, shuffle
        self._block_size, self._nodes, self._group_samples = block_size, nodes, group_samples
        self._lock = ForkLock()
        self._deals: OrderedDict[int, _Deal] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], NDArray[np.uint32]] = OrderedDict()
        if self.num_samples == 0:
            raise DataError("the data set has no samples")
        if nodes > (most := min(self.num_samples, group_samples)):
            raise DataError(
                f"data.shuffle_canonical_nodes={nodes} is more than the {most} samples of a data set that "
                "are shuffled at once; lower it"
            )
        if shuffle and len(shard_sizes) > 1 and int(0.75 * block_size) < max(shard_sizes):
            warnings.warn(
                f"data.shuffle_block_size={block_size} is too small to mix shards of "
                f"{max(shard_sizes)} samples; raise it to {2 * max(shard_sizes)}",
                stacklevel=2,
            )

    def samples_at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sample numbers at the given places of the endless order.

        Args:
            places: any places from 0 on, in any epochs.
        """
        places = np.asarray(places, np.int64)
        epochs, within = np.divmod(places, self.num_samples)
        if not self._shuffle or not len(places):
            return within
        first, last = int(places.min()), int(places.max())
        if first // self.num_samples == last // self.num_samples:  # true of nearly every step
            epoch, offset = divmod(first, self.num_samples)
            deal = self._deal(epoch)
            group = int(deal.starts.searchsorted(offset, side="right")) - 1
            if group == len(deal.starts) - 1 or last % self.num_samples < deal.starts[group + 1]:
                chosen = within - deal.starts[group]
                return self._group(epoch, group)[chosen].astype(np.int64)
        samples = np.empty_like(within)
        for epoch in np.unique(epochs):
            deal = self._deal(int(epoch))
            in_epoch = epochs == epoch
            groups = np.searchsorted(deal.starts, within, side="right") - 1
            for group in np.unique(groups[in_epoch]):
                chosen = in_epoch & (groups == group)
                offsets = within[chosen] - deal.starts[group]
                samples[chosen] = self._group(int(epoch), int(group))[offsets]
        return samples

    def shards_ahead(self, place: int, num_places: int) -> list[int]:
        """Return the shards that ``num_places`` places from ``place`` on touch, in that order."""
        ahead = self.samples_at(np.arange(place, place + min(self.num_samples, num_places)))
        shards = np.searchsorted(self._starts, ahead, side="right") - 1
        _, first = np.unique(shards, return_index=True)
        return shards[np.sort(first)].tolist()

    def fingerprint(self) -> str:
        """Return a hash of the first samples of the first epoch and of the data set's size."""
        first = self.samples_at(np.arange(min(FINGERPRINT_SAMPLES, self.num_samples)))
        text = f"{self.num_samples} ".encode() + first.astype("<i8").tobytes()
        return hashlib.sha256(text).hexdigest()

    def _deal(self, epoch: int) -> "_Deal":
        with self._lock:
            if epoch not in self._deals:
                self._deals[epoch] = _deal_shards(
                    self._sizes, self._seed, epoch, self._group_samples
                )
                while len(self._deals) > GROUPS_KEPT:
                    self._deals.popitem(last=False)
            return self._deals[epoch]

    def _group(self, epoch: int, group: int) -> NDArray[np.uint32]:
        with self._lock:
            if (epoch, group) in self._groups:
                self._groups.move_to_end((epoch, group))
                return self._groups[epoch, group]
        shards = self._deal(epoch).shards[group]
        sizes = self._sizes[shards]
        # The group's number enters the seed; else groups with equal shard sizes get the same permutation.
        seed = self._seed + group * 7919
        nodes = min(self._nodes, int(sizes.sum()))  # the last group of an epoch may be small
        places = streaming_shim.epoch_permutation(
            sizes, nodes=nodes, seed=seed, epoch=epoch, block_size=self._block_size
        )
        # Convert sample numbers within the group to those of the data set, shard by shard.
        shift = self._starts[shards] - np.concatenate([[0], np.cumsum(sizes)[:-1]])
        samples = (places + np.repeat(shift, sizes)[places]).astype(self._sample_dtype)
        with self._lock:
            self._groups[epoch, group] = samples
            while len(self._groups) > GROUPS_KEPT:
                self._groups.popitem(last=False)
        return samples

    @property
    def _sample_dtype(self) -> type:
        return np.uint32 if self.num_samples < 1 << 32 else np.int64


class _Deal:
    """The shards of each group in one epoch, and the place in the epoch where each group starts."""

    def __init__(self, shards: list[NDArray[np.int64]], sizes: NDArray[np.int64]) -> None:
        self.shards = shards
        counts = [int(sizes[group].sum()) for group in shards]
        self.starts = np.concatenate([[0], np.cumsum(counts)])[:-1]


def _deal_shards(sizes: NDArray[np.int64], seed: int, epoch: int, group_samples: int) -> _Deal:
    if int(sizes.sum()) <= group_samples:
        return _Deal([np.arange(len(sizes))], sizes)
    shuffled = np.random.default_rng([_EPOCH_STREAM, seed, epoch]).permutation(len(sizes))
    # A shard belongs to the group in which its first sample falls; groups are never empty.
    first = np.cumsum(sizes[shuffled]) - sizes[shuffled]
    cuts = np.flatnonzero(np.diff(first // group_samples)) + 1
    return _Deal([np.sort(group) for group in np.split(shuffled, cuts)], sizes)
