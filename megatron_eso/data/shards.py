"""Read MDS shards of one fixed-size token column through a memory map.

An MDS shard is a uint32 sample count, that many plus one uint32 offsets, the column description, and
the samples one after another. With one column of fixed size the samples are a plain array.
"""

import json
from pathlib import Path

import numpy as np
import xxhash

from megatron_eso.data.manifest import Manifest
from megatron_eso.errors import DataError


class ShardedTokens:
    """The samples of one split by number, [num_samples, L + 1]."""

    def __init__(self, folder: Path, *, verify_hashes: bool) -> None:
        """Open a split; shards are opened and checked when first read."""
        self.folder, self._verify = folder, verify_hashes
        self.manifest = Manifest.load(folder)
        index = json.loads((folder / "index.json").read_text())
        self._entries = index["shards"]
        self.shard_sizes = np.array([entry["samples"] for entry in self._entries], dtype=np.int64)
        self._ends = self.shard_sizes.cumsum()
        self._open: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """Number of samples."""
        return int(self._ends[-1])

    def read(self, samples: np.ndarray) -> np.ndarray:
        """Return [n, L + 1] int64 tokens of the numbered samples.

        Raises:
            DataError: naming the shard that is missing or damaged.
        """
        out = np.empty((len(samples), self.manifest.sequence_length + 1), dtype=np.int64)
        shard_of = np.searchsorted(self._ends, samples, side="right")
        for shard in np.unique(shard_of):
            here = shard_of == shard
            first = self._ends[shard] - self.shard_sizes[shard]
            out[here] = self._shard(int(shard))[samples[here] - first]
        highest = int(out.max(initial=0))
        if highest >= self.manifest.vocab_size - 1:
            raise DataError(
                f"{self.folder} holds token id {highest}, beyond the tokenizer's "
                f"{self.manifest.vocab_size - 1} ids"
            )
        return out

    def _shard(self, shard: int) -> np.ndarray:
        if shard not in self._open:
            self._open[shard] = self._load(self._entries[shard])
        return self._open[shard]

    def _load(self, entry: dict) -> np.ndarray:
        path = self.folder / entry["raw_data"]["basename"]
        expected = entry["raw_data"]["bytes"]
        try:
            raw = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise DataError(f"shard {path} cannot be read: {error}") from None
        if len(raw) != expected:
            raise DataError(f"shard {path} has {len(raw)} bytes instead of {expected}")
        if self._verify:
            stored = entry["raw_data"]["hashes"].get("xxh64")
            if stored and xxhash.xxh64(raw.data).hexdigest() != stored:
                raise DataError(f"shard {path} is damaged: its hash is not the index's")
        count = int(raw[:4].view(np.uint32)[0])
        begin = int(raw[4:8].view(np.uint32)[0])
        width = self.manifest.sequence_length + 1
        tokens = raw[begin:].view(self.manifest.dtype)
        if count != entry["samples"] or tokens.size != count * width:
            raise DataError(
                f"shard {path} does not hold {entry['samples']} samples of {width} tokens"
            )
        return tokens.reshape(count, width)
