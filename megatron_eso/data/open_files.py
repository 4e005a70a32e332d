"""The open shard files of a process, kept within its limit however many splits it reads.

Each split looks up its own files, without a lock. Opening one more may close another split's oldest.
A file closes with its last user, so a read that has begun always completes.
"""

import os
import resource
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from functools import cache

from megatron_eso.data.fork_lock import ForkLock

MOST_OPEN_FILES = 2048  # per process; each costs the kernel about 1 KiB


@dataclass(frozen=True)
class OpenShard:
    """An open file and where its rows start."""

    descriptor: int
    first_byte: int

    def __del__(self) -> None:
        os.close(self.descriptor)


class OpenFiles:
    """The open shards of one split by number, in the order in which they were opened."""

    def __init__(self) -> None:
        self.of_shard: OrderedDict[int, OpenShard] = OrderedDict()
        self._adds_until_look = 0
        with _process().lock:
            _process().splits.add(self)

    def add(self, shard: int, opened: OpenShard) -> OpenShard:
        """Keep and return an open file, or return the one that another thread opened meanwhile."""
        with _process().lock:
            self._forget_removed()
            kept = self.of_shard.setdefault(shard, opened)
            _close_oldest()
            return kept

    def clear(self) -> None:
        """Forget the files; each closes when its last read ends."""
        with _process().lock:
            self.of_shard.clear()

    def _forget_removed(self) -> None:
        """Close files that a full cache removed, so that the disk gets back their space."""
        self._adds_until_look -= 1
        if self._adds_until_look > 0:
            return
        gone = [n for n, one in self.of_shard.items() if os.fstat(one.descriptor).st_nlink == 0]
        for number in gone:
            del self.of_shard[number]
        # This looks at about eight files for each one added: enough, and cheap where many are open.
        self._adds_until_look = len(self.of_shard) // 8


def most_open_files() -> int:
    """Return how many files to keep open: at most half of what the system allows the process."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY:
        return MOST_OPEN_FILES
    return max(1, min(MOST_OPEN_FILES, allowed // 2))


class _Process:
    """What the splits of a process share."""

    def __init__(self) -> None:
        self.lock = ForkLock()
        self.splits: weakref.WeakSet[OpenFiles] = weakref.WeakSet()


@cache
def _process() -> _Process:
    return _Process()


def _close_oldest() -> None:
    """Close files, always of the split that has most open, until the process is within its limit."""
    splits, most = list(_process().splits), most_open_files()
    while sum(len(split.of_shard) for split in splits) > most:
        max(splits, key=lambda split: len(split.of_shard)).of_shard.popitem(last=False)
