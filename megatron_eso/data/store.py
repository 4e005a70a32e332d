"""Where a split's files are: in a local folder, read in place and verified, or behind a cache.

Both give open descriptors of whole, verified, uncompressed shards. A fault never passes silently: a damaged
cached copy is fetched again; anything else raises an error that names the shard.
"""

import errno
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_eso.data import streaming_shim
from megatron_eso.data.manifest import PREPARE_AGAIN
from megatron_eso.errors import DataError

READ_BYTES = 1 << 30
RESTORE = f"restore it or {PREPARE_AGAIN}"


@dataclass(frozen=True)
class StoredFile:
    """Name, size and hashes of one file of a shard."""

    name: str
    num_bytes: int
    hashes: tuple[tuple[str, str], ...]

    def problem_of(self, data: bytes, *, check_hash: bool) -> str | None:
        """Return what is wrong with a file's content, or None."""
        if len(data) != self.num_bytes:
            return f"has {len(data)} bytes instead of {self.num_bytes}"
        if check_hash:
            for algorithm, expected in self.hashes:
                found = streaming_shim.known_hash(algorithm, data)
                if found != expected:
                    return f"is damaged: its {algorithm} is {found} instead of {expected}"
        return None


@dataclass(frozen=True)
class ShardFile:
    """One shard of an index: its uncompressed file and, if stored compressed, the compressed one."""

    num_samples: int
    raw: StoredFile
    compressed: StoredFile | None
    compression: str | None

    @property
    def num_bytes(self) -> int:
        """Return the size of the uncompressed file."""
        return self.raw.num_bytes

    @property
    def stored(self) -> StoredFile:
        """Return the file as it is in the store."""
        return self.compressed or self.raw

    @staticmethod
    def from_index(entry: dict[str, Any]) -> "ShardFile":
        """Return the shard that an entry of streaming's index.json describes."""
        compressed = _stored(entry["zip_data"]) if entry["zip_data"] else None
        return ShardFile(
            entry["samples"], _stored(entry["raw_data"]), compressed, entry["compression"]
        )


class Store(Protocol):
    """Where the files of one split come from."""

    address: str

    def read_small(self, name: str, sha256: str | None) -> bytes:
        """Return a small file's content, checked against its hash if one is given."""
        ...

    def open(self, shard: ShardFile) -> int:
        """Return a read-only descriptor of the whole, verified, uncompressed shard."""
        ...

    def describe(self, shard: ShardFile) -> str:
        """Return the shard's full address, for messages."""
        ...


class LocalStore:
    """Uncompressed shards in a local folder."""

    def __init__(self, folder: Path, *, verify_hashes: bool) -> None:
        self.address = str(folder)
        self._folder = folder
        self._whole = WholeFiles(verify_hashes=verify_hashes)

    def read_small(self, name: str, sha256: str | None) -> bytes:
        """Return a small file's content, checked against its hash if one is given."""
        try:
            content = (self._folder / name).read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {self._folder / name}: {error.strerror}") from None
        check_small(content, f"{self.address}/{name}", sha256)
        return content

    def open(self, shard: ShardFile) -> int:
        """Return a descriptor of the shard, read in place."""
        path = self._folder / shard.raw.name
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            is_limit = error.errno in (errno.EMFILE, errno.ENFILE)
            advice = "raise the limit (ulimit -n)" if is_limit else RESTORE
            raise DataError(f"shard {path} cannot be opened ({error.strerror}); {advice}") from None
        problem = self._whole.problem_of(descriptor, shard.raw)
        if problem is not None:
            os.close(descriptor)
            raise DataError(f"shard {path} {problem}; {RESTORE}")
        return descriptor

    def describe(self, shard: ShardFile) -> str:
        """Return the shard's path."""
        return f"{self.address}/{shard.raw.name}"


def check_small(content: bytes, where: str, sha256: str | None) -> None:
    """Refuse a file with another SHA-256 than the given one."""
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256:
        raise DataError(
            f"{where} is not the file its manifest describes (sha256 {found[:12]}..., not "
            f"{sha256[:12]}...); the data set was changed or damaged"
        )


class WholeFiles:
    """Which files of a split this process has found whole, so that reopening one does not hash it again."""

    def __init__(self, *, verify_hashes: bool) -> None:
        self._verify_hashes = verify_hashes
        # Name -> hash of what changes whenever the file does; a hash takes less memory.
        self._states: dict[str, int] = {}

    def problem_of(self, descriptor: int, file: StoredFile) -> str | None:
        """Return what is wrong with an open file, or None; read it only if it has changed."""
        state = _state_of(descriptor)
        check_hash = self._verify_hashes and self._states.get(file.name) != state
        problem = problem_of_open(descriptor, file, check_hash=check_hash)
        if check_hash and problem is None:
            self._states[file.name] = state
        return problem

    def add(self, descriptor: int, file: StoredFile) -> None:
        """Note a file whose content was checked before it was written."""
        if self._verify_hashes:
            self._states[file.name] = _state_of(descriptor)


def problem_of_open(descriptor: int, file: StoredFile, *, check_hash: bool) -> str | None:
    """Return what is wrong with an open file, or None; read it only to check its hash."""
    size = os.fstat(descriptor).st_size
    if size != file.num_bytes or not check_hash:
        return None if size == file.num_bytes else f"has {size} bytes instead of {file.num_bytes}"
    parts, offset = [], 0
    while part := os.pread(descriptor, READ_BYTES, offset):
        parts.append(part)
        offset += len(part)
    return file.problem_of(parts[0] if len(parts) == 1 else b"".join(parts), check_hash=True)


def _state_of(descriptor: int) -> int:
    status = os.fstat(descriptor)
    return hash((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))


def _stored(entry: dict[str, Any]) -> StoredFile:
    return StoredFile(entry["basename"], entry["bytes"], tuple(sorted(entry["hashes"].items())))
