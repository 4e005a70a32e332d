"""A lock that is free in a forked child, where the thread that held it does not exist.

This package's locks guard caches whose entries are always added whole, so a child may continue with
whatever it finds.
"""

import os
import threading
import weakref
from functools import cache
from typing import Any


class ForkLock:
    """A lock between threads; a context manager."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        _all_locks().add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exception: Any) -> None:
        self._lock.release()

    def renew(self) -> None:
        """Free the lock, whoever held it."""
        self._lock = threading.Lock()


@cache
def _all_locks() -> "weakref.WeakSet[ForkLock]":
    locks: weakref.WeakSet[ForkLock] = weakref.WeakSet()

    def renew_all() -> None:
        for lock in list(locks):
            lock.renew()

    os.register_at_fork(after_in_child=renew_all)
    return locks
