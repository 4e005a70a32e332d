"""Writes rows of tokens as mosaicml-streaming's MDS shards, byte for byte as its MDSWriter does.

All rows have one size, so whole blocks of them can be written together. Streaming's writer would also
import torch, which costs seconds and hundreds of MiB in every worker of ``data prepare``. A contract test
checks that both writers make the same files.
"""

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from megatron_eso.data import streaming_shim
from megatron_eso.data.manifest import INDEX_NAME

_OFFSET = np.dtype(np.uint32)


class RowWriter:
    """Writes the shards of one split; the index is written when its ``with`` block ends normally."""

    def __init__(
        self, folder: Path, *, dtype: str, row_tokens: int, shard_bytes: int, zstd: bool
    ) -> None:
        """Create the folder.

        Args:
            folder: where the shards go; must not exist or must be empty.
            dtype: type of the stored tokens, uint16 or uint32.
            row_tokens: tokens in a row.
            shard_bytes: largest shard before compression.
            zstd: compress the shards.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._dtype, self._zstd = folder, np.dtype(dtype), zstd
        self._row_bytes = row_tokens * self._dtype.itemsize
        self._facts: dict[str, Any] = {
            "version": 2, "format": "mds", "compression": "zstd" if zstd else None,
            "hashes": [streaming_shim.HASH_ALGORITHM], "size_limit": shard_bytes,
            "column_names": ["tokens"], "column_encodings": [f"ndarray:{dtype}:{row_tokens}"],
            "column_sizes": [self._row_bytes],
        }  # fmt: skip
        self._config = json.dumps(self._facts, sort_keys=True).encode()
        room = shard_bytes - 2 * _OFFSET.itemsize - len(self._config)
        self._rows_of_shard = max(room // (self._row_bytes + _OFFSET.itemsize), 1)
        self.num_rows = 0
        """Rows taken so far."""
        self._blocks: list[NDArray[Any]] = []
        self._num_held = 0
        self._shards: list[dict[str, Any]] = []

    def write(self, rows: NDArray[Any]) -> None:
        """Take rows [n, row_tokens] of any integer type; write shards as they become full."""
        self.num_rows += len(rows)
        while len(rows):
            room = self._rows_of_shard - self._num_held
            if not room:
                self._write_shard()
                continue
            block = rows[:room].astype(self._dtype)
            self._blocks.append(block)
            self._num_held += len(block)
            rows = rows[room:]

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write the last shard and the index, unless an exception ended the block."""
        if kind is not None:
            return
        if self._num_held:
            self._write_shard()
        index = json.dumps({"version": 2, "shards": self._shards}, sort_keys=True)
        (self._folder / INDEX_NAME).write_text(index)

    def _write_shard(self) -> None:
        number = self._num_held
        first = _OFFSET.itemsize * (number + 2) + len(self._config)
        offsets = first + self._row_bytes * np.arange(number + 1)
        raw = b"".join(
            [
                _OFFSET.type(number).tobytes(),
                offsets.astype(_OFFSET).tobytes(),
                self._config,
                *(block.data for block in self._blocks),
            ]
        )
        self._blocks, self._num_held = [], 0
        name = f"shard.{len(self._shards):05}.mds"
        entry = {
            "samples": number,
            "raw_data": _described(name, raw),
            "zip_data": None,
            **self._facts,
        }
        if self._zstd:
            name, raw = f"{name}.zstd", streaming_shim.compress("zstd", raw)
            entry["zip_data"] = _described(name, raw)
        (self._folder / name).write_bytes(raw)
        self._shards.append(entry)


def _described(name: str, data: bytes) -> dict[str, Any]:
    """Return the index's entry for a file."""
    hashes = {streaming_shim.HASH_ALGORITHM: streaming_shim.file_hash(data)}
    return {"basename": name, "bytes": len(data), "hashes": hashes}
