"""Every fault is healed or raised by name; no row is ever wrong and nothing ends early in silence.

Each of these made streaming's own iteration end an epoch early, hang, or hand out wrong samples.
"""

import contextlib
import errno
import os
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_eso.config.schema import DataConfig, DataSourceConfig
from megatron_eso.data import open_files
from megatron_eso.data import store as data_store
from megatron_eso.data.cache import CachedStore, CacheSettings
from megatron_eso.data.manifest import load_manifest, sha256_of
from megatron_eso.data.prepare import prepare
from megatron_eso.data.reader import RowReader, ValidationReader
from megatron_eso.data.row_writer import RowWriter
from megatron_eso.data.transports import FolderTransport, StreamingTransport, transport_for
from megatron_eso.data.verify import verify_split
from megatron_eso.errors import DataError
from tests.data.conftest import SEQUENCE_LENGTH, VOCAB_SIZE, in_small_shards, options

SHARD = "shard.00000.mds"


@pytest.fixture(scope="module")
def remote(store, prepared):
    return store.upload(prepared, "set") + "/train"


@pytest.fixture
def expected(prepared):
    return rows_of(str(prepared / "train"))


def rows_of(address: str, **settings) -> np.ndarray:
    """Read a whole split in order."""
    data = DataConfig(timeout_seconds=1.0, **{"retries": 3, **settings})
    reader = ValidationReader(address, data, sequence_length=SEQUENCE_LENGTH, vocab_size=VOCAB_SIZE)
    try:
        return reader.read(range(reader.num_rows)).tokens
    finally:
        reader.close()


def rewrite(path: Path, change) -> None:
    content = bytearray(path.read_bytes())
    path.write_bytes(change(content))


def flipped(content: bytearray) -> bytearray:
    content[-1] ^= 1
    return content


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda path: path.unlink(), "No such file", id="missing"),
        pytest.param(lambda path: rewrite(path, lambda c: c[:-7]), "instead of", id="cut short"),
        pytest.param(lambda path: rewrite(path, flipped), "is damaged", id="one bit flipped"),
        pytest.param(lambda path: path.write_bytes(b""), "has 0 bytes", id="empty"),
    ],
)
def test_a_damaged_local_shard_is_an_error_that_names_it(
    prepared, tmp_path, damage, message, num_workers
):
    shutil.copytree(prepared, tmp_path / "set")
    damage(tmp_path / "set" / "train" / SHARD)
    data = DataConfig(
        sources=[DataSourceConfig(str(tmp_path / "set" / "train"))], num_workers=num_workers
    )
    reader = RowReader(
        data, sequence_length=SEQUENCE_LENGTH, vocab_size=VOCAB_SIZE, global_batch_rows=8, seed=0
    )
    with pytest.raises(DataError, match=f"{SHARD}.*{message}"):
        for step in range(1000):
            reader.read(step, range(8))
    reader.close()


def test_a_shard_cut_short_while_it_is_open_is_an_error(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "set")
    reader = ValidationReader(
        tmp_path / "set" / "train", sequence_length=SEQUENCE_LENGTH, vocab_size=VOCAB_SIZE
    )
    reader.read([0])
    os.truncate(tmp_path / "set" / "train" / SHARD, 5000)
    with pytest.raises(DataError, match=f"{SHARD} was cut short"):
        reader.read(range(reader.num_rows))


@pytest.fixture
def many_shards(prepared, tmp_path):
    """Return a split of a few dozen shards."""
    folder = shutil.copytree(prepared, tmp_path / "many") / "train"
    in_small_shards(folder, shard_bytes=600)
    return folder


def open_shards() -> int:
    return sum(".mds" in os.readlink(path) for path in Path("/proc/self/fd").iterdir()
               if path.is_symlink())  # fmt: skip


def test_splits_share_what_the_system_lets_a_process_open(many_shards):
    expected = rows_of(str(many_shards))
    before = open_shards()
    used, limits = len(os.listdir("/proc/self/fd")), resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = 2 * used + 40
    data = DataConfig()
    readers = [
        ValidationReader(many_shards, data, sequence_length=SEQUENCE_LENGTH, vocab_size=VOCAB_SIZE)
        for _ in range(allowed // len(list(many_shards.glob("*.mds"))) + 2)
    ]
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, limits[1]))
    try:
        for reader in readers:
            assert np.array_equal(reader.read(range(reader.num_rows)).tokens, expected)
        assert open_shards() <= allowed // 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    for reader in readers:
        reader.close()
    assert open_shards() <= before


@pytest.fixture
def hashed(monkeypatch):
    """Return the files that are hashed when they are opened, as it goes."""
    found = []

    def noted(descriptor, file, *, check_hash, check=data_store.problem_of_open):
        found.extend([file.name] * check_hash)
        return check(descriptor, file, check_hash=check_hash)

    monkeypatch.setattr(data_store, "problem_of_open", noted)
    return found


def test_a_shard_that_is_opened_again_is_not_hashed_again_unless_it_changed(
    many_shards, hashed, monkeypatch
):
    monkeypatch.setattr(open_files, "MOST_OPEN_FILES", 3)
    reader = ValidationReader(many_shards, sequence_length=SEQUENCE_LENGTH, vocab_size=VOCAB_SIZE)
    rows = [reader.read(range(reader.num_rows)).tokens for _ in range(3)]
    assert np.array_equal(rows[0], rows[2])
    names = sorted(path.name for path in many_shards.glob("*.mds"))
    assert len(names) > 20 and sorted(hashed) == names
    rewrite(many_shards / SHARD, flipped)
    with pytest.raises(DataError, match=f"{SHARD}.*is damaged"):
        reader.read(range(reader.num_rows))


@pytest.fixture
def compressed(corpus, prepared, tmp_path):
    """Return a compressed split, which is read through the cache."""
    prepare([str(corpus)], tmp_path / "set", options(compress=True), num_processes=1,
            tokenizer=str(prepared / "tokenizer.json"))  # fmt: skip
    return tmp_path / "set" / "train"


def test_a_cached_shard_is_not_hashed_again_because_another_process_used_it(
    compressed, tmp_path, hashed
):
    data = DataConfig(cache_dir=str(tmp_path / "cache"))
    readers = [
        ValidationReader(compressed, data, sequence_length=SEQUENCE_LENGTH, vocab_size=VOCAB_SIZE)
        for _ in range(2)
    ]
    for reader in readers * 3:
        reader.read([0])
        reader.close()
    assert len(hashed) == 1  # by the reader that did not fetch it


def test_a_split_prepared_again_is_not_read_from_the_copies_of_the_old_one(compressed, tmp_path):
    settings = {"cache_dir": str(tmp_path / "cache"), "verify_hashes": False}
    before = rows_of(str(compressed), **settings)
    manifest = load_manifest(compressed)
    with RowWriter(
        compressed, dtype=manifest.dtype, row_tokens=manifest.row_tokens, shard_bytes=1 << 26, zstd=True,
    ) as writer:  # fmt: skip
        writer.write(before[::-1])
    replace(manifest, index_sha256=sha256_of(compressed / "index.json")).save(compressed)
    assert np.array_equal(rows_of(str(compressed), **settings), before[::-1])


def test_verify_reads_the_stored_shards_and_not_their_copies(compressed, tmp_path):
    data = DataConfig(cache_dir=str(tmp_path / "cache"), retries=1)
    rows_of(str(compressed), cache_dir=data.cache_dir)
    kept = sorted((tmp_path / "cache").rglob("*"))
    assert verify_split(str(compressed), data, print) == load_manifest(compressed).num_samples
    rewrite(compressed / f"{SHARD}.zstd", flipped)
    said = []
    with pytest.raises(DataError, match="has 1 fault"):
        verify_split(str(compressed), data, said.append)
    assert f"{SHARD}.zstd" in said[0] and "is damaged" in said[0]
    assert sorted((tmp_path / "cache").rglob("*")) == kept


def test_hosts_that_share_a_folder_may_have_processes_of_the_same_number(
    compressed, tmp_path, monkeypatch
):
    """Each of two containers has a process 17: none may write to, or remove, what the other does."""
    monkeypatch.setattr(os, "getpid", lambda: 17)
    written = []

    def fetch(self, name, target, original=FolderTransport.fetch):
        written.append(target)
        original(self, name, target)

    monkeypatch.setattr(FolderTransport, "fetch", fetch)
    transport = transport_for(str(compressed), timeout_seconds=1.0)
    settings = CacheSettings(tmp_path / "cache", None, retries=1, verify_hashes=True)
    stores = [CachedStore(str(compressed), transport, settings) for _ in range(2)]
    for one in stores:
        one.read_small("index.json", None)
    assert len(set(written)) == len(written) == 2


def test_a_retry_fetches_over_what_an_earlier_attempt_left(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "shard.mds").write_bytes(b"whole")
    target = tmp_path / "shard.part"
    target.write_bytes(b"who")
    StreamingTransport(str(tmp_path / "store"), timeout_seconds=5.0).fetch("shard.mds", target)
    assert target.read_bytes() == b"whole"


@pytest.mark.parametrize("name", ["index.json", "manifest.json"])
def test_a_changed_index_or_manifest_is_refused(prepared, tmp_path, name):
    shutil.copytree(prepared, tmp_path / "set")
    rewrite(
        tmp_path / "set" / "train" / name,
        lambda content: content.replace(b'"samples": ', b'"samples": 1'),
    )
    rewrite(
        tmp_path / "set" / "train" / name,
        lambda c: c.replace(b'"num_samples": ', b'"num_samples": 1'),
    )
    with pytest.raises(DataError, match=r"index\.json"):
        rows_of(str(tmp_path / "set" / "train"))


def test_a_remote_split_reads_as_the_local_one_and_is_fetched_once(
    store, remote, expected, tmp_path
):
    store.requests.clear()
    for _ in range(2):
        assert np.array_equal(rows_of(remote, cache_dir=str(tmp_path)), expected)
    assert sum(SHARD in request for request in store.requests) == 1


@pytest.mark.parametrize("fault", ["503", "stall", "trickle", "cut", "short", "flip"])
def test_a_passing_fault_is_healed(store, remote, expected, tmp_path, fault):
    store.faults = {SHARD: [fault]}
    assert np.array_equal(rows_of(remote, cache_dir=str(tmp_path)), expected)
    assert store.faults == {SHARD: []}


@pytest.mark.parametrize("fault", ["404", "403", "503", "stall", "cut", "short", "flip"])
def test_a_lasting_fault_is_an_error_that_names_the_shard(store, remote, tmp_path, fault):
    store.faults = {SHARD: [f"{fault}!"]}
    store.requests.clear()
    with pytest.raises(DataError, match=rf"s3://shards/set/train/{SHARD} could not be fetched"):
        rows_of(remote, cache_dir=str(tmp_path), retries=2)
    attempts = sum(SHARD in request for request in store.requests)
    assert attempts == (1 if fault in ("404", "403") else 2)
    assert not list(tmp_path.rglob("*.part"))
    store.faults = {}


def test_missing_credentials_are_named(store, remote, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(DataError, match="no credentials"):
        rows_of(remote, cache_dir=str(tmp_path))


def test_a_poisoned_cache_is_fetched_again_after_a_restart(store, remote, expected, tmp_path):
    rows_of(remote, cache_dir=str(tmp_path))
    cached = next(tmp_path.rglob("shard.00000.*.mds"))
    rewrite(cached, flipped)
    assert np.array_equal(rows_of(remote, cache_dir=str(tmp_path)), expected)


@pytest.mark.slow
def test_a_cache_that_another_user_began_is_read(remote, expected, tmp_path, monkeypatch):
    """Only a file's owner may set its times."""
    rows_of(remote, cache_dir=str(tmp_path))

    def refuse(*arguments, **settings):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refuse)
    assert np.array_equal(rows_of(remote, cache_dir=str(tmp_path)), expected)


def test_a_bounded_cache_drops_old_shards_and_reads_on(store, corpus, tmp_path_factory, tmp_path):
    folder = tmp_path_factory.mktemp("many") / "set"
    settings = options(sequence_length=SEQUENCE_LENGTH)
    prepare([str(corpus)] * 9, folder, settings, num_processes=1)
    in_small_shards(folder / "train")
    address = store.upload(folder, "many") + "/train"
    sizes = [path.stat().st_size for path in (folder / "train").glob("*.mds")]
    assert len(sizes) > 3
    limit = 2.5 * max(sizes)
    whole = rows_of(str(folder / "train"))
    data = DataConfig(
        sources=[DataSourceConfig(address)], num_workers=2, prefetch_shards=1,
        cache_dir=str(tmp_path), cache_limit_gib=limit / 2**30,
    )  # fmt: skip
    reader = RowReader(
        data, sequence_length=SEQUENCE_LENGTH, vocab_size=VOCAB_SIZE, global_batch_rows=64, seed=0
    )
    for step in range(8):
        samples = [sample for _, sample in reader.samples_of(step, range(64))]
        assert np.array_equal(reader.read(step, range(64)).tokens, whole[samples])
        assert cached_bytes(tmp_path) <= limit
    reader.close()


def cached_bytes(folder: Path) -> int:
    """Return the bytes of the cached shards; reader threads may evict one meanwhile."""
    total = 0
    for path in folder.rglob("*.mds"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def test_another_process_evicts_a_shard_the_moment_it_is_there(
    remote, expected, tmp_path, monkeypatch
):
    """Eviction holds no lock of the shard: the name may be gone while the file is being opened."""

    def replace_and_lose(part, path, replace=os.replace):
        replace(part, path)
        if path.suffix == ".mds":
            path.unlink()

    monkeypatch.setattr(os, "replace", replace_and_lose)
    assert np.array_equal(rows_of(remote, cache_dir=str(tmp_path)), expected)
    monkeypatch.undo()
    rows_of(remote, cache_dir=str(tmp_path))

    def check_and_lose(descriptor, *arguments, check=data_store.problem_of_open, **named):
        problem = check(descriptor, *arguments, **named)
        Path(f"/proc/self/fd/{descriptor}").resolve().unlink()
        return problem

    monkeypatch.setattr(data_store, "problem_of_open", check_and_lose)
    assert list(tmp_path.rglob("*.mds"))
    assert np.array_equal(rows_of(remote, cache_dir=str(tmp_path)), expected)
    assert not list(tmp_path.rglob("*.mds"))


def test_a_cache_smaller_than_a_shard_is_refused(store, remote, tmp_path):
    with pytest.raises(DataError, match=r"data\.cache_limit_gib=.* is less than one shard"):
        rows_of(remote, cache_dir=str(tmp_path), cache_limit_gib=1e-6)


def test_a_full_cache_disk_is_an_error_that_names_the_setting(store, remote, tmp_path, monkeypatch):
    from megatron_eso.data import object_store

    def full(self, name, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(object_store.ObjectFolder, "_copy", full)
    with pytest.raises(DataError, match=r"No space left.*data\.cache_dir"):
        rows_of(remote, cache_dir=str(tmp_path))


def test_compressed_shards_read_as_plain_ones(corpus, tmp_path):
    prepare([str(corpus)], tmp_path / "plain", options(), num_processes=1)
    prepare([str(corpus)], tmp_path / "zstd", options(compress=True), num_processes=1)
    assert list((tmp_path / "zstd" / "train").glob("*.zstd"))
    unpacked = rows_of(str(tmp_path / "zstd" / "train"), cache_dir=str(tmp_path / "cache"))
    assert np.array_equal(unpacked, rows_of(str(tmp_path / "plain" / "train")))
