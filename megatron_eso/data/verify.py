"""``data verify``: checks every hash, size and token of a split, and reports all faults."""

from collections import Counter
from collections.abc import Callable

import numpy as np

from megatron_eso.config.schema import DataConfig
from megatron_eso.data.manifest import PREPARE_AGAIN
from megatron_eso.data.open_split import open_split
from megatron_eso.data.shards import ShardedRows
from megatron_eso.errors import DataError

ROWS_AT_ONCE = 4096


def verify_split(address: str, data: DataConfig, say: Callable[[str], None]) -> int:
    """Read every shard of a split as stored, not a cached copy; return the number of rows.

    Args:
        address: the split.
        data: retry settings, and the cache folder, which holds one shard at a time of a split that is
            not read in place. Hashes are checked whatever the settings say.
        say: receives a line per fault.

    Raises:
        DataError: if anything is wrong, after all shards were checked.
    """
    split = open_split(address, data, verify_hashes=True, pass_by_cache=True)
    faults = _duplicates(split)
    num_tokens = first = 0
    for shard, size in enumerate(split.shard_sizes):
        samples = range(first, first + size)
        first += size
        try:
            num_tokens += _verify_shard(split, shard, samples)
        except DataError as error:
            faults.append(str(error))
        finally:
            split.close()  # frees the disk space of a fetched shard
    if not faults and num_tokens != split.manifest.num_tokens:
        faults.append(
            f"{address} holds {num_tokens} tokens, but its manifest says {split.manifest.num_tokens}"
        )
    for fault in faults:
        say(fault)
    if faults:
        raise DataError(
            f"{address} has {len(faults)} fault(s); restore its files or {PREPARE_AGAIN}"
        )
    return split.num_samples


def _verify_shard(split: ShardedRows, shard: int, samples: range) -> int:
    """Return the number of tokens in a shard, without padding and each row's overlap with the next."""
    num_tokens = 0
    for begin in samples[::ROWS_AT_ONCE]:
        rows = split.read(np.arange(begin, min(begin + ROWS_AT_ONCE, samples.stop)))
        if int(rows.max()) > split.manifest.mask_id:
            raise DataError(
                f"shard {split.name_of(shard)} holds token {int(rows.max())}, beyond the vocabulary of "
                f"{split.manifest.vocab_size}"
            )
        num_tokens += int((rows[:, :-1] != split.manifest.mask_id).sum())
    return num_tokens


def _duplicates(split: ShardedRows) -> list[str]:
    names: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for shard, hashes in enumerate(split.shard_hashes):
        names.setdefault(hashes, []).append(split.name_of(shard))
    counts = Counter({hashes: len(same) for hashes, same in names.items() if hashes})
    return [
        f"shards {', '.join(names[hashes])} have the same content"
        for hashes, count in counts.items()
        if count > 1
    ]
