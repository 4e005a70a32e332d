"""Signals that end a run in good order: the handler only sets a flag, the loop asks for it."""

import signal
from types import FrameType

_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Remembers the first signal that asked the run to stop; the second one of a kind interrupts."""

    def __init__(self) -> None:
        self.name = ""

    def install(self) -> None:
        """Catch the signals in this process (main thread only)."""
        for number in _STOPPING:
            signal.signal(number, self._remember)

    @property
    def is_set(self) -> bool:
        """True once a signal has come."""
        return bool(self.name)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if not self.name:
            self.name = signal.Signals(number).name
