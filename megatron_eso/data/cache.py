"""Remote (or compressed) shards behind a bounded local cache, shared by all processes of a host.

A shard is fetched under a lock to ``.part``, checked, unpacked, checked again and renamed. So a file
under its own name was whole when it was written. It is checked once more when a process first opens it,
and a damaged one is fetched again. Locks are ``flock`` locks, which end with their process.
"""

import errno
import logging
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from uuid import uuid4

from megatron_eso.data import streaming_shim
from megatron_eso.data.object_store import StoreError
from megatron_eso.data.store import ShardFile, StoredFile, WholeFiles, check_small
from megatron_eso.data.transports import Transport
from megatron_eso.errors import DataError

log = logging.getLogger(__name__)
FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 10.0


@dataclass(frozen=True)
class CacheSettings:
    """Limits of the cache and of fetching; see ``DataConfig``."""

    root: Path
    limit_bytes: int | None
    retries: int
    verify_hashes: bool
    is_passed_by: bool = False
    """Every shard is fetched anew; while open, it takes space in the cache folder but has no name."""


class CachedStore:
    """The shards of one split, read through a local cache."""

    def __init__(self, address: str, transport: Transport, settings: CacheSettings) -> None:
        self.address = address.rstrip("/")
        self._transport, self._settings = transport, settings
        self._whole = WholeFiles(verify_hashes=settings.verify_hashes)
        self._folder = settings.root / sha256(self.address.encode()).hexdigest()[:16]
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"cannot make the cache folder {self._folder} ({error.strerror}): set data.cache_dir"
            ) from None

    def read_small(self, name: str, sha256: str | None) -> bytes:
        """Return a small file's content, fetched anew and checked against its hash."""
        part = self._own_part(name)
        try:
            self._fetch(name, part, None)
            content = part.read_bytes()
        finally:
            part.unlink(missing_ok=True)
        check_small(content, f"{self.address}/{name}", sha256)
        return content

    def open(self, shard: ShardFile) -> int:
        """Return a descriptor of the whole shard; fetch it unless a whole copy is cached."""
        from filelock import FileLock

        if self._settings.is_passed_by:
            part = self._own_part(shard.stored.name)
            try:
                return self._bring(part, shard)
            finally:
                part.unlink(missing_ok=True)
        path = self._folder / _cached_name(shard.raw)
        with FileLock(path.with_suffix(".lock")):
            descriptor = self._open_cached(path, shard)
            if descriptor is None:
                self._make_room(shard.num_bytes)
                part = path.with_suffix(".part")
                descriptor = self._bring(part, shard)
                os.replace(part, path)
                self._whole.add(descriptor, shard.raw)
            return descriptor

    def describe(self, shard: ShardFile) -> str:
        """Return the shard's full address."""
        return f"{self.address}/{shard.stored.name}"

    def _open_cached(self, path: Path, shard: ShardFile) -> int | None:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        problem = self._whole.problem_of(descriptor, shard.raw)
        if problem is None:
            # The eviction, which may just have removed the name, goes by the last use. The last
            # change stays: by it processes recognize a file that they have found whole.
            with suppress(PermissionError):  # a cache that another user began
                os.utime(descriptor, ns=(time.time_ns(), os.fstat(descriptor).st_mtime_ns))
            return descriptor
        os.close(descriptor)
        log.warning("cached shard %s %s; fetching it again", path, problem)
        path.unlink(missing_ok=True)
        return None

    def _own_part(self, name: str) -> Path:
        """Return a name that no other process uses; processes on other hosts may have the same number."""
        return self._folder / f".{Path(name).name}.{uuid4().hex}.part"

    def _bring(self, part: Path, shard: ShardFile) -> int:
        """Fetch a shard to ``part``; return its descriptor, which stays valid without that name."""
        self._fetch(shard.stored.name, part, shard.stored)
        if shard.compressed is not None:
            data = streaming_shim.decompress(shard.compression or "", part.read_bytes())
            problem = shard.raw.problem_of(data, check_hash=True)
            if problem is not None:
                part.unlink()
                raise DataError(f"shard {self.describe(shard)}, unpacked, {problem}")
            try:
                part.write_bytes(data)
            except OSError as error:
                part.unlink(missing_ok=True)
                raise self._write_error(error) from error
        return os.open(part, os.O_RDONLY)

    def _fetch(self, name: str, part: Path, expected: StoredFile | None) -> None:
        """Fetch a whole file; after a failure try again, with growing pauses."""
        pause, problem = FIRST_PAUSE_SECONDS, ""
        for attempt in range(1, self._settings.retries + 1):
            try:
                self._transport.fetch(name, part)
                problem = self._problem_of_part(part, expected)
                if problem is None:
                    return
            except StoreError as error:
                problem = str(error)
                if error.is_permanent:
                    break
            except OSError as error:
                part.unlink(missing_ok=True)
                if error.errno != errno.ENOSPC or not self._evict_oldest():
                    raise self._write_error(error) from error
                problem = "the cache disk was full"
            log.warning("%s/%s, attempt %d: %s", self.address, name, attempt, problem)
            if attempt < self._settings.retries:
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        part.unlink(missing_ok=True)
        raise DataError(
            f"{self.address}/{name} could not be fetched after {attempt} of "
            f"{self._settings.retries} attempts (data.retries): {problem}"
        )

    def _problem_of_part(self, part: Path, expected: StoredFile | None) -> str | None:
        if expected is None:
            return None
        return expected.problem_of(part.read_bytes(), check_hash=True)

    def _write_error(self, error: OSError) -> DataError:
        return DataError(
            f"cannot write to the cache {self._folder} ({error.strerror}): free space, lower "
            "data.cache_limit_gib, or set data.cache_dir to another disk"
        )

    def _make_room(self, num_bytes: int) -> None:
        limit = self._settings.limit_bytes
        if limit is None:
            return
        if num_bytes > limit:
            raise DataError(
                f"data.cache_limit_gib={limit / 2**30:g} is less than one shard of "
                f"{num_bytes / 2**30:.3g} GiB; raise it"
            )
        while self._used_bytes() + num_bytes > limit and self._evict_oldest():
            pass

    def _used_bytes(self) -> int:
        return sum(size for _, size, _ in self._cached_files())

    def _evict_oldest(self) -> bool:
        """Remove the least recently used shard; readers that have it open keep their copy."""
        files = sorted(self._cached_files())
        if files:
            with suppress(FileNotFoundError):  # another process removed it
                files[0][2].unlink()
        return bool(files)

    def _cached_files(self) -> list[tuple[int, int, Path]]:
        found = []
        for path in self._settings.root.glob("*/*.mds"):
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_atime_ns, status.st_size, path))
        return found


def _cached_name(file: StoredFile) -> str:
    """Return a name made from the content: a new split may take the address of an earlier one."""
    content = sha256(f"{file.num_bytes} {file.hashes}".encode()).hexdigest()[:16]
    return f"{Path(file.name).stem}.{content}.mds"
