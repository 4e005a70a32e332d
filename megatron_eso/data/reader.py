"""Rows of any step, for any rank: the reader that the training loop and the evaluation use.

Row r of step s is place ``s * global_batch_rows + r`` of the run's endless order, whatever the world
size, layout or number of reader threads. So a run resumes from its step alone, and ranks may divide rows
in any way. Ranks do not communicate here: the loop reads on some ranks and passes the rows on.
"""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_eso.config.schema import DataConfig
from megatron_eso.data.manifest import Manifest
from megatron_eso.data.mixture import Mixture
from megatron_eso.data.open_split import open_held_out, open_sources, tokenizer_json
from megatron_eso.data.order import SampleOrder
from megatron_eso.data.plan_reads import ReadPlans
from megatron_eso.data.shards import ShardedRows, row_buffers

# Once per this many reads, the shards to fetch ahead are looked up among the places of twice as many steps.
READS_PER_WARMING = 16
# But among this many at least: a small batch takes many steps until it needs a new shard.
PLACES_AHEAD = 4096


@dataclass(frozen=True)
class TokenRows:
    """Rows of tokens; at padding ``is_valid`` is False and the token is the end-of-document token."""

    tokens: NDArray[np.int64]
    """Token ids [n, L + 1]."""
    is_valid: NDArray[np.bool_]
    """False at padding [n, L + 1]."""


class RowReader:
    """Training rows by step and global row number, from one source or a weighted mixture."""

    def __init__(
        self,
        data: DataConfig,
        *,
        sequence_length: int,
        vocab_size: int,
        global_batch_rows: int,
        seed: int,
    ) -> None:
        """Open the sources; no shard is read yet.

        Args:
            data: the run's data section.
            sequence_length: L of the run; every source must have it.
            vocab_size: vocabulary of the model, mask token included; every source must have it.
            global_batch_rows: rows of one step on all ranks together.
            seed: seed of the order.

        Raises:
            DataError: for missing, empty or unsuitable sources.
        """
        self._data, self._seed, self._batch_rows = data, seed, global_batch_rows
        self._splits = open_sources(data, sequence_length=sequence_length, vocab_size=vocab_size)
        self._mixture = Mixture([source.weight for source in data.sources], seed=seed)
        self._orders = [
            SampleOrder(
                split.shard_sizes,
                seed=seed + 104729 * number,  # a data set named twice must not repeat itself
                shuffle=data.shuffle,
                block_size=data.shuffle_block_size,
                nodes=data.shuffle_canonical_nodes,
            )
            for number, split in enumerate(self._splits)
        ]
        self._plans = ReadPlans(
            self._orders, self._mixture, self._splits, batch_rows=global_batch_rows
        )
        first = self.manifests[0]
        self._scratch = _Scratch(np.dtype(first.dtype), first.row_tokens)
        self._threads: ThreadPoolExecutor | None = None
        self._process = os.getpid()
        self._ahead: dict[tuple[int, tuple[int, ...]], Future[TokenRows]] = {}
        self._warming: Future[None] | None = None
        self._num_reads = 0

    @property
    def manifests(self) -> list[Manifest]:
        """Return the manifests of the sources, in the configuration's order."""
        return [split.manifest for split in self._splits]

    def read(self, step: int, rows: Sequence[int]) -> TokenRows:
        """Return rows of a step, and start reading the same rows of the next step.

        Args:
            step: optimizer step, from 0.
            rows: global row numbers, each in [0, global_batch_rows).

        Raises:
            DataError: for a shard that is missing, damaged or cannot be fetched, naming it.
        """
        wanted = tuple(rows)
        if self._data.num_workers == 0:
            return self._read(step, wanted)
        threads = self._thread_pool()
        future = self._ahead.pop((step, wanted), None)
        for key in [key for key in self._ahead if key[0] < step]:
            self._ahead.pop(key).cancel()
        result = future.result() if future is not None else self._read(step, wanted)
        self._ahead[step + 1, wanted] = threads.submit(self._read, step + 1, wanted)
        is_warm = self._warming is None or self._warming.done()
        if self._num_reads % READS_PER_WARMING == 0 and self._data.prefetch_shards and is_warm:
            self._warming = threads.submit(self._warm, step)
        self._num_reads += 1
        return result

    def example_rows(self, number: int, *, num_shards: int = 8) -> TokenRows:
        """Return rows for statistics: each source's share, from a few shards spread over the source.

        About ``num_shards`` files are fetched, however large the sources are. The same rows at any layout.

        Args:
            number: about how many rows; fewer if those shards hold fewer.
            num_shards: about how many shards to read in all; at least one of each source.

        Raises:
            DataError: for a shard that is missing, damaged or cannot be fetched, naming it.
        """
        total, found = sum(self._mixture.shares), []
        for share, split in zip(self._mixture.shares, self._splits, strict=True):
            wanted = max(1, round(number * share / total))
            many = min(max(1, round(num_shards * share / total)), len(split.shard_sizes))
            shards = np.linspace(0, len(split.shard_sizes) - 1, many).round().astype(np.int64)
            found += [split.read_spread(shard, -(-wanted // many)) for shard in shards.tolist()]
        return _checked_rows(np.concatenate(found), self._splits[0].manifest)

    def tokenizer_json(self) -> bytes:
        """Return the content of the sources' tokenizer file.

        Raises:
            DataError: if it is missing beside the first source, or is another tokenizer.
        """
        return tokenizer_json(self._data.sources[0].path, self.manifests[0], self._data)

    @property
    def tokens_per_epoch(self) -> int:
        """Return the number of tokens in all sources together."""
        return sum(manifest.num_tokens for manifest in self.manifests)

    def fingerprint(self) -> dict[str, Any]:
        """Return what must be the same when a run continues: data, mixture, order and batch."""
        # One source needs no mixture, and shuffled orders already differ by seed.
        needs_seed = len(self._splits) > 1 and not self._data.shuffle
        return {
            "data.sources": [manifest.index_sha256 for manifest in self.manifests],
            "tokenizer": self.manifests[0].tokenizer_sha256,
            "mixture": [*self._mixture.shares, self._mixture.period, *[self._seed] * needs_seed],
            "order": [order.fingerprint() for order in self._orders],
            "train.global_batch_rows": self._batch_rows,
        }

    def samples_of(self, step: int, rows: Sequence[int]) -> list[tuple[int, int]]:
        """Return (source, sample number) of rows of a step, without reading them."""
        places = self._plans.places(np.array([step]), tuple(rows))
        sources, samples = self._plans.samples(places.reshape(-1))
        return list(zip(sources.tolist(), samples.tolist(), strict=True))

    def close(self) -> None:
        """Stop the reader threads and close the files."""
        if self._threads is not None and self._process == os.getpid():
            self._threads.shutdown(wait=True, cancel_futures=True)
        self._threads = None
        self._ahead.clear()
        for split in self._splits:
            split.close()

    def _read(self, step: int, rows: tuple[int, ...]) -> TokenRows:
        stored, memory = self._scratch.of(len(rows))
        for part in self._plans.of_step(step, rows):
            self._splits[part.source].fill(memory, part.places, part.shards, part.offsets)
        return _checked_rows(stored, self._splits[0].manifest)

    def _warm(self, step: int) -> None:
        """Fetch shards that the next steps touch and that are not open, as most shards of a shuffle are."""
        place = (step + 1) * self._batch_rows
        end = place + max(PLACES_AHEAD, 2 * READS_PER_WARMING * self._batch_rows)
        begins, ends = self._mixture.consumed(place), self._mixture.consumed(end)
        for order, split, first, last in zip(self._orders, self._splits, begins, ends, strict=True):
            split.warm(order.shards_ahead(first, last - first), self._data.prefetch_shards)

    def _thread_pool(self) -> ThreadPoolExecutor:
        if self._threads is None or self._process != os.getpid():  # threads do not survive a fork
            self._ahead.clear()
            self._warming, self._process = None, os.getpid()
            # One more, so that rows never wait for shards that are only needed later.
            self._threads = ThreadPoolExecutor(self._data.num_workers + 1, "rows")
        return self._threads


class ValidationReader:
    """Rows of a held-out split, in the order in which they were written."""

    def __init__(
        self,
        path: str | Path,
        data: DataConfig | None = None,
        *,
        sequence_length: int,
        vocab_size: int,
        tokenizer_sha256: str | None = None,
    ) -> None:
        """Open a split.

        Args:
            path: folder or address.
            data: cache and retry settings for remote splits.
            sequence_length: tokens in a row; must be the split's.
            vocab_size: vocabulary of the model, mask token included; must be the split's.
            tokenizer_sha256: hash of the model's tokenizer; must be the split's. None: not known.

        Raises:
            DataError: if the split does not fit.
        """
        self._split = open_held_out(
            str(path), data or DataConfig(), sequence_length=sequence_length, vocab_size=vocab_size,
            tokenizer_sha256=tokenizer_sha256,
        )  # fmt: skip

    @property
    def manifest(self) -> Manifest:
        """Return the split's manifest."""
        return self._split.manifest

    @property
    def num_rows(self) -> int:
        """Return the number of rows."""
        return self._split.num_samples

    @property
    def bytes_per_token(self) -> float:
        """Return UTF-8 bytes of text per token: nats per token / (this x ln 2) is bits per byte."""
        return self.manifest.bytes_per_token

    def read(self, rows: Sequence[int]) -> TokenRows:
        """Return rows by number.

        Raises:
            DataError: for a shard that is missing, damaged or cannot be fetched, naming it.
        """
        wanted = np.array(rows, np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < self.num_rows:
            raise ValueError(f"rows {list(rows)}: the split has rows 0 to {self.num_rows - 1}")
        return token_rows(self._split, wanted)

    def close(self) -> None:
        """Close the files."""
        self._split.close()


def token_rows(split: ShardedRows, samples: NDArray[np.int64]) -> TokenRows:
    """Return the rows of some samples, with padding marked and replaced by the end token."""
    return _checked_rows(split.read(samples), split.manifest)


def _checked_rows(stored: NDArray[Any], manifest: Manifest) -> TokenRows:
    """Return stored rows as tokens, in new memory; ``stored`` may be reused."""
    tokens = stored.astype(np.int64)
    if manifest.mask_id in stored[:, -1].tolist():  # padding is always at the end of a row
        valid = stored != manifest.mask_id
        tokens[~valid] = manifest.end_of_document_id
    else:
        valid = np.empty(tokens.shape, np.bool_)
        valid.fill(True)
    return TokenRows(tokens, valid)


class _Scratch(threading.local):
    """Per-thread memory that rows are read into before they get their final type."""

    def __init__(self, dtype: np.dtype[Any], row_tokens: int) -> None:
        self._dtype, self._row_tokens = dtype, row_tokens
        self._stored = np.empty((0, row_tokens), dtype)
        self._rows: list[tuple[memoryview]] = []

    def of(self, num_rows: int) -> tuple[NDArray[Any], list[tuple[memoryview]]]:
        """Return memory for ``num_rows`` rows, as an array and row by row."""
        if len(self._rows) != num_rows:
            self._stored = np.empty((num_rows, self._row_tokens), self._dtype)
            self._rows = row_buffers(self._stored)
        return self._stored, self._rows
