"""From the address of a split to its rows: a local folder in place."""

from pathlib import Path

from megatron_eso.config.schema import DataConfig
from megatron_eso.data.shards import ShardedRows
from megatron_eso.data.store import LocalStore, local_split
from megatron_eso.data.tokenizer import Tokenizer
from megatron_eso.errors import DataError


def open_split(address: str, data: DataConfig, *, verify_hashes: bool | None = None) -> ShardedRows:
    """Return the rows of a split.

    Args:
        address: local folder.
        data: cache, retry and verification settings.
        verify_hashes: overrides the setting.

    Raises:
        DataError: if the split is missing, empty, damaged, or its tokenizer was replaced.
    """
    if not address:
        raise DataError("a data source has no path: set data.sources[].path")
    folder = Path(address)
    store = LocalStore(
        folder, verify_hashes=data.verify_hashes if verify_hashes is None else verify_hashes
    )
    return ShardedRows(store, local_split(folder))


def tokenizer_of(address: str, split: ShardedRows) -> Tokenizer:
    """Return the tokenizer that made a split."""
    return Tokenizer(Path(address) / split.manifest.tokenizer_file)
