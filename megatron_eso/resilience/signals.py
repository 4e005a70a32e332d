"""Signals that end a run in good order: the handler only sets a flag, and the loop polls it."""

import faulthandler
import signal
import time
from types import FrameType

from megatron_eso.launch.processes import STOPPING, release_signals


class StopRequest:
    """Remembers the first signal that asked the run to stop."""

    def __init__(self) -> None:
        self.name = ""
        self._came = 0.0

    def install(self) -> None:
        """Catch the stop signals in this process (main thread only), also those held back until now."""
        for number in STOPPING:
            signal.signal(number, self._remember)
        # With this signal the launcher asks a hanging rank for its stack traces.
        faulthandler.register(signal.SIGUSR2, all_threads=True)
        release_signals()

    @property
    def is_set(self) -> bool:
        """True once a signal has come."""
        return bool(self.name)

    @property
    def seconds_ago(self) -> float:
        """Time since the signal; 0 if none came to this rank."""
        return time.monotonic() - self._came if self.name else 0.0

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if not self.name:
            self.name, self._came = signal.Signals(number).name, time.monotonic()
