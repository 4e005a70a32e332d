"""The rows of a step, for any rank, by their numbers in the global batch.

Nothing here knows ranks or keeps a place: row r of step g is sample g * global_batch_rows + r of the
run's order. With ``data.prefetch`` a thread reads the same rows of the next step meanwhile.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_eso.config.schema import DataConfig
from megatron_eso.data.order import EpochOrder, Mixture
from megatron_eso.data.shards import ShardedTokens
from megatron_eso.errors import DataError

_FINGERPRINT = 4096  # entries of the order that the fingerprint covers


@dataclass(frozen=True)
class TokenRows:
    """Samples of L + 1 tokens."""

    tokens: np.ndarray
    """[n, L + 1] int64."""
    is_valid: np.ndarray
    """[n, L + 1] bool; False for padding. Packed samples have none."""


class RowReader:
    """Training data of a run."""

    def __init__(
        self,
        data: DataConfig,
        *,
        sequence_length: int,
        vocab_size: int,
        global_batch_rows: int,
        seed: int,
    ) -> None:
        if not data.sources:
            raise DataError("data.sources is empty: name at least one prepared folder")
        self._sources = [
            open_split(Path(source.path), sequence_length, vocab_size, data.verify_hashes)
            for source in data.sources
        ]
        _require_one_tokenizer(self._sources)
        self._mixture = Mixture.from_weights([source.weight for source in data.sources])
        self._orders = [
            EpochOrder(
                source.shard_sizes,
                seed,
                data.shuffle,
                data.shuffle_block_size,
                data.shuffle_canonical_nodes,
            )
            for source in self._sources
        ]
        self._rows_per_step = global_batch_rows
        self._pool = ThreadPoolExecutor(1) if data.prefetch else None
        self._ahead: tuple[int, tuple[int, ...], Future] | None = None

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens of all sources, each once."""
        return sum(len(s) * s.manifest.sequence_length for s in self._sources)

    def read(self, step: int, rows: Sequence[int]) -> TokenRows:
        """Return the rows of a step.

        Raises:
            DataError: if a shard is missing or damaged.
        """
        wanted = (step, tuple(rows))
        if self._ahead is not None and self._ahead[:2] == wanted:
            result = self._ahead[2].result()
        else:
            result = self._read(step, tuple(rows))
        if self._pool is not None:
            following = self._pool.submit(self._read, step + 1, tuple(rows))
            self._ahead = (step + 1, tuple(rows), following)
        return result

    def fingerprint(self) -> dict:
        """Return what must be the same when a run continues: data, mixture and order."""
        order = [
            o.samples(np.arange(min(_FINGERPRINT, int(o.shard_sizes.sum())))) for o in self._orders
        ]
        digest = hashlib.sha256(b"".join(part.astype("<i8").tobytes() for part in order))
        digest.update(self._mixture.pattern.astype("<i8").tobytes())
        return {
            "indexes": [source.manifest.index_sha256 for source in self._sources],
            "tokenizer": self._sources[0].manifest.tokenizer_sha256,
            "order": digest.hexdigest(),
            "global_batch_rows": self._rows_per_step,
        }

    def close(self) -> None:
        """Stop reading ahead."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _read(self, step: int, rows: tuple[int, ...]) -> TokenRows:
        indices = step * self._rows_per_step + np.asarray(rows, dtype=np.int64)
        source, place = self._mixture.place(indices)
        width = self._sources[0].manifest.sequence_length + 1
        tokens = np.empty((len(rows), width), dtype=np.int64)
        for number, (shards, order) in enumerate(zip(self._sources, self._orders, strict=True)):
            here = source == number
            if here.any():
                tokens[here] = shards.read(order.samples(place[here]))
        return TokenRows(tokens, np.ones(tokens.shape, dtype=bool))


class ValidationReader:
    """A held-out split in written order."""

    def __init__(self, path: Path, *, sequence_length: int, vocab_size: int) -> None:
        self._shards = open_split(path, sequence_length, vocab_size, True)

    @property
    def num_rows(self) -> int:
        """Number of samples."""
        return len(self._shards)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token, for bits per byte."""
        manifest = self._shards.manifest
        return manifest.text_bytes / manifest.num_tokens

    def read(self, rows: Sequence[int]) -> TokenRows:
        """Return numbered samples."""
        tokens = self._shards.read(np.asarray(rows, dtype=np.int64))
        return TokenRows(tokens, np.ones(tokens.shape, dtype=bool))


def open_split(
    folder: Path, sequence_length: int, vocab_size: int, verify_hashes: bool
) -> ShardedTokens:
    """Open a split and compare it with the run's settings.

    Raises:
        DataError: if row length or vocabulary differ.
    """
    shards = ShardedTokens(folder, verify_hashes=verify_hashes)
    manifest = shards.manifest
    if manifest.sequence_length != sequence_length:
        raise DataError(
            f"{folder} holds rows of {manifest.sequence_length} tokens, the run asks for "
            f"train.sequence_length={sequence_length}"
        )
    if manifest.vocab_size != vocab_size:
        raise DataError(
            f"{folder} was made with a vocabulary of {manifest.vocab_size} (tokenizer and mask), the run "
            f"asks for model.vocab_size={vocab_size}"
        )
    return shards


def _require_one_tokenizer(sources: list[ShardedTokens]) -> None:
    names = {source.manifest.tokenizer_sha256 for source in sources}
    if len(names) > 1:
        folders = ", ".join(str(source.folder) for source in sources)
        raise DataError(f"the data sources were made with different tokenizers: {folders}")
