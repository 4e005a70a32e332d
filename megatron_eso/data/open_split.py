"""From a split's address to its rows: uncompressed local shards in place, all others through the cache."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from megatron_eso.config.schema import DataConfig, RunConfig
from megatron_eso.data.cache import CachedStore, CacheSettings
from megatron_eso.data.fits import (
    check_alike,
    check_fits,
    check_tokenizer,
    distinct,
    held_out_of,
    naming,
    require_path,
    require_sources,
    shape_of,
    sources_of,
)
from megatron_eso.data.manifest import (
    INDEX_NAME,
    MANIFEST_NAME,
    Manifest,
    local_split,
    parse_manifest,
)
from megatron_eso.data.shards import ShardedRows
from megatron_eso.data.store import LocalStore
from megatron_eso.data.tokenizer import Tokenizer
from megatron_eso.data.transports import transport_for
from megatron_eso.files import is_remote


def open_split(
    address: str,
    data: DataConfig,
    *,
    verify_hashes: bool | None = None,
    pass_by_cache: bool = False,
) -> ShardedRows:
    """Return the rows of a split.

    Args:
        address: local folder or object-store address (s3://, gs://, ...).
        data: cache, retry and verification settings.
        verify_hashes: overrides the setting.
        pass_by_cache: read the stored shards themselves, and keep no copy.

    Raises:
        DataError: if the split is missing, empty, damaged, or its tokenizer was replaced.
    """
    require_path(address)
    verify = data.verify_hashes if verify_hashes is None else verify_hashes
    if is_remote(address):
        store = _cached_store(address, data, verify, pass_by_cache)
        content = store.read_small(MANIFEST_NAME, None)
        return ShardedRows(store, parse_manifest(content, f"{address}/{MANIFEST_NAME}"))
    manifest = local_split(Path(address))
    if _is_compressed(Path(address)):
        store = _cached_store(str(Path(address).resolve()), data, verify, pass_by_cache)
        return ShardedRows(store, manifest)
    return ShardedRows(LocalStore(Path(address), verify_hashes=verify), manifest)


def open_sources(data: DataConfig, *, sequence_length: int, vocab_size: int) -> list[ShardedRows]:
    """Open and return the training splits of a run; no shard is read yet.

    Args:
        data: the run's data section.
        sequence_length: L of the run; every source must have it.
        vocab_size: vocabulary of the model, mask token included; every source must have it.

    Raises:
        DataError: for missing, empty or unsuitable sources, naming the setting.
    """
    require_sources(data)
    splits = []
    for setting, path in sources_of(data).items():
        with naming(setting):
            splits.append(open_split(path, data))
            check_fits(splits[-1].manifest, path, sequence_length, vocab_size)
    check_alike([source.path for source in data.sources], [split.manifest for split in splits])
    return splits


def open_held_out(
    path: str,
    data: DataConfig,
    *,
    sequence_length: int,
    vocab_size: int,
    tokenizer_sha256: str | None = None,
) -> ShardedRows:
    """Open and return a held-out split.

    Args:
        path: folder or address.
        data: cache and retry settings for remote splits.
        sequence_length: tokens in a row; must be the split's.
        vocab_size: vocabulary of the model, mask token included; must be the split's.
        tokenizer_sha256: hash of the model's tokenizer; must be the split's. None: not known.

    Raises:
        DataError: if the split does not fit.
    """
    split = open_split(path, data)
    check_fits(split.manifest, path, sequence_length, vocab_size)
    check_tokenizer(split.manifest, path, tokenizer_sha256)
    return split


def require_data(runs: Iterable[RunConfig]) -> None:
    """Open all data that the runs will read, as they would, and close it; the same data only once.

    Raises:
        DataError: as a run would raise when it starts, naming the setting.
    """
    for run in distinct(runs):
        shape = shape_of(run)
        opened = open_sources(run.data, **shape)
        tokenizer = opened[0].manifest.tokenizer_sha256
        for setting, path in held_out_of(run.data).items():
            with naming(setting):
                opened.append(open_held_out(path, run.data, **shape, tokenizer_sha256=tokenizer))
        for split in opened:
            split.close()


def tokenizer_of(address: str, manifest: Manifest, data: DataConfig) -> Tokenizer:
    """Return the tokenizer that made a split."""
    if not is_remote(address):
        return Tokenizer(Path(address) / manifest.tokenizer_file)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_bytes(tokenizer_json(address, manifest, data))
        return Tokenizer(path)


def tokenizer_json(address: str, manifest: Manifest, data: DataConfig) -> bytes:
    """Return the content of the tokenizer file that made a split.

    Raises:
        DataError: if the file is missing or is another tokenizer.
    """
    name, folder = manifest.tokenizer_file, address.rstrip("/")
    if name.startswith("../"):
        name, folder = name.removeprefix("../"), os.path.dirname(folder)
    if is_remote(address):
        return _cached_store(folder, data, True).read_small(name, manifest.tokenizer_sha256)
    return LocalStore(Path(folder), verify_hashes=True).read_small(name, manifest.tokenizer_sha256)


def _is_compressed(folder: Path) -> bool:
    try:
        entries = json.loads((folder / INDEX_NAME).read_bytes())["shards"]
    except (OSError, ValueError, KeyError):
        return False  # reported where the index is read and checked
    return any(entry.get("zip_data") for entry in entries)


def _cached_store(
    address: str, data: DataConfig, verify_hashes: bool, pass_by_cache: bool = False
) -> CachedStore:
    limit = data.cache_limit_gib
    settings = CacheSettings(
        root=Path(data.cache_dir) if data.cache_dir else default_cache(),
        limit_bytes=None if limit is None else int(limit * 2**30),
        retries=data.retries,
        verify_hashes=verify_hashes,
        is_passed_by=pass_by_cache,
    )
    transport = transport_for(address, timeout_seconds=data.timeout_seconds)
    return CachedStore(address, transport, settings)


def default_cache() -> Path:
    """Return our folder under the system's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "megatron_eso"
