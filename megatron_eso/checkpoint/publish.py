"""Rank 0's part of a save: turn a folder of shards into a checkpoint, then remove older ones.

A file system may take minutes for that, so a thread does it while training goes on. A save that is past its
limit is given up, but nothing can stop its thread: the two settle under a lock which of them came first.
"""

import logging
import threading
import time
from collections.abc import Callable

from megatron_eso.checkpoint.folder import CheckpointFolder, remove
from megatron_eso.errors import LostLeaseError
from megatron_eso.launch import events, lease

log = logging.getLogger(__name__)


class Publication:
    """A thread that publishes one save."""

    def __init__(
        self,
        folder: CheckpointFolder,
        held: lease.Held,
        begin: float,
        *,
        write: Callable[[], None],
        remove_older: Callable[[], None],
    ) -> None:
        """Start the thread.

        Args:
            folder: of the save.
            held: the lease; a folder is left alone once it is lost, as it may be another attempt's.
            begin: when the save began, by ``time.perf_counter``.
            write: writes what makes the folder a checkpoint, the marker last.
            remove_older: called once it is one.
        """
        self.failure = ""
        """Why it is no checkpoint; empty also if the lease was lost."""
        self.is_committed = False
        self._is_given_up, self._verdict = False, threading.Lock()
        self._folder, self._lease, self._begin = folder, held, begin
        # The thread alone holds the functions, and so the state to save, and not for longer than it runs.
        self._thread = threading.Thread(target=self._run, args=(write, remove_older), daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """True while the thread is at work."""
        return self._thread.is_alive()

    def look(self, late: str) -> tuple[bool, str]:
        """Return whether it is not committed yet, and why it will never be.

        Args:
            late: why it is given up now if it is not committed; empty: there is time left.
        """
        if not self.is_alive:
            return not self.is_committed, self.failure
        if late:
            with self._verdict:
                self._is_given_up = not self.is_committed
        return not self.is_committed, late if self._is_given_up else ""

    def _run(self, write: Callable[[], None], remove_older: Callable[[], None]) -> None:
        is_whole = False
        try:
            write()
            is_whole = True
        except LostLeaseError:
            pass  # the lease has noted it
        except Exception as error:  # reported by every rank: nothing is swallowed
            self.failure = f"{type(error).__name__}: {error}"
        seconds = time.perf_counter() - self._begin
        with self._verdict:
            self.is_committed = is_whole and not self._is_given_up
        if self.is_committed:
            step, run = self._folder.step, self._folder.path.parents[1]
            log.info("checkpoint %s committed after %.1f s", self._folder.path, seconds)
            events.record(run, "committed", step=step, seconds=seconds)
            remove_older()
        elif not self._lease.lost:
            # If it was given up, the run may have gone back since, and must not meet this step later.
            discard(self._folder)


def discard(folder: CheckpointFolder) -> None:
    """Remove a folder that is no checkpoint; warn if that cannot be done."""
    try:
        remove(folder)
    except OSError as error:
        log.warning("%s, which is no checkpoint, could not be removed: %s", folder.path, error)
