"""Work in a forked process; the parent never waits for it forever.

The fork sees memory as it was when forked, so CPU tensors are written without a copy while training goes
on. The child dies with its parent, answers through a pipe, and can be killed at any time.

CPython 3.11.7 may fork a child that never runs: if another thread (of autograd, say) holds the lock of the
threads' list at that moment, the child waits for it before its first line. So the parent waits for a
sign of life, while memory stays as it is, and forks again if none comes.
"""

import atexit
import gc
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from megatron_eso.launch.processes import STOPPING, die_with_parent, release_signals

SIGN_OF_LIFE_SECONDS = 10.0
"""How long to wait for a sign of life. A child that runs gives it within milliseconds."""
SECONDS_TO_DIE = 10.0
"""How long to wait for a killed child: one that waits for a file system that hangs cannot die."""
_TRIES = 3
log = logging.getLogger(__name__)


class Child:
    """A function that runs in a forked process."""

    def __init__(self, function: Callable[[], Any]) -> None:
        """Start the process.

        Raises:
            OSError: if no child gives a sign of life.
        """
        self.result: Any = None
        self.failure = ""
        for _ in range(_TRIES):
            self._fork(function)
            if self._answer.poll(SIGN_OF_LIFE_SECONDS):
                with suppress(EOFError):  # it died immediately, as is_running will find too
                    self._answer.recv()
                break
            self._process.kill()
            self._end()
        else:
            raise OSError(
                f"{_TRIES} forked processes gave no sign of life within {SIGN_OF_LIFE_SECONDS:g} s each"
            )

    def _fork(self, function: Callable[[], Any]) -> None:
        context = multiprocessing.get_context("fork")
        self._answer, theirs = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_run, args=(theirs, self._answer, function, os.getpid()), daemon=True
        )
        self._process.start()
        theirs.close()
        # Else Python, when this process ends, sends it SIGTERM, which it ignores, and waits for it.
        atexit.register(self.kill, "its parent ended")

    @property
    def is_running(self) -> bool:
        """True until the result is here or the process has failed."""
        if self._answer.closed:
            return False
        if not self._answer.poll():  # a dead process closes its end, which counts as an answer
            return True
        try:
            is_ok, value = self._answer.recv()
        except (EOFError, OSError):
            self._process.join()
            is_ok, value = False, f"the writer process ended with code {self._process.exitcode}"
        self.result, self.failure = (value, "") if is_ok else (None, str(value))
        self._end()
        return False

    def kill(self, why: str) -> None:
        """End the process without a result."""
        if not self._answer.closed:
            self._process.kill()
            self.failure = why
            self._end()

    def _end(self) -> None:
        atexit.unregister(self.kill)
        self._answer.close()
        self._process.join(SECONDS_TO_DIE)
        if self._process.is_alive():
            # It makes no further call: it dies when the file system answers.
            log.warning("a killed writer (process %d) still waits in the kernel", self._process.pid)
            return
        self._process.close()


def _run(answer: Any, other_end: Any, function: Callable[[], Any], parent: int) -> None:
    # The garbage collector might free the parent's CUDA events or memory, which ends a forked process.
    gc.disable()
    for number in STOPPING:  # a stop of the run lets the save under way finish
        signal.signal(number, signal.SIG_IGN)
    release_signals()
    die_with_parent(parent)
    other_end.close()
    answer.send("begun")
    try:
        outcome = (True, function())
    except Exception as error:  # the parent reports it: nothing is swallowed
        outcome = (False, f"{type(error).__name__}: {error}")
    answer.send(outcome)
    answer.close()
    os._exit(0)  # without the exit handlers inherited from the parent
