"""What a rank tells its launcher while it runs: which section it is in, and how long that may take.

Each rank writes a record of fixed size into a file that it shares with the launcher. The launcher judges
from outside: a rank that is stopped (SIGSTOP), waits forever in a collective, or holds Python's lock
cannot report it, but its record stops changing.

A section's limit is a multiple of its longest duration so far, never below a floor.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_eso.launch.agents import FtMonitor
from megatron_eso.launch.shared_file import SharedFile, inherited

VARIABLE = "MEGATRON_ESO_HEARTBEAT"
_BYTES = 128


@dataclass(frozen=True)
class Beat:
    """A rank's latest record."""

    number: int
    section: str
    """setup, step, evaluation, checkpoint or end."""
    step: int
    """Optimizer steps done."""
    kept_step: int
    """Step of the newest checkpoint, from which a restart would continue; -1: none."""
    limit_seconds: float


class Board:
    """The launcher's side: the record of one rank."""

    def __init__(self) -> None:
        self.file = SharedFile(VARIABLE)

    def clear(self) -> None:
        """Forget the record."""
        os.ftruncate(self.file.descriptor, 0)

    def read(self) -> Beat | None:
        """Return the rank's latest record; None before the first one, or if it is half written."""
        words = os.pread(self.file.descriptor, _BYTES, 0).decode("ascii", "replace").split()
        try:
            number, section, step, kept, limit = words
            return Beat(int(number), section, int(step), int(kept), float(limit))
        except ValueError:
            return None


class Heart:
    """A rank's side; if no launcher listens, every call does nothing."""

    def __init__(
        self,
        environ: Mapping[str, str],
        *,
        setup_seconds: float,
        floor_seconds: float,
        factor: float,
    ) -> None:
        """Start in the section ``setup``.

        Args:
            environ: the process's environment.
            setup_seconds: limit of the first section and of any that was never measured.
            floor_seconds: no limit is below this.
            factor: a section may take this many times its longest duration so far.
        """
        self._descriptor = inherited(VARIABLE, environ)
        self._ft_monitor = FtMonitor.find(environ)
        self._setup, self._floor, self._factor = setup_seconds, floor_seconds, factor
        self._longest: dict[str, float] = {}
        self._first_step: float | None = None
        self._number, self._section, self._began = 0, "", time.monotonic()
        self.step, self.kept_step = 0, -1
        self.enter("setup")

    def enter(self, section: str) -> None:
        """Begin a section and record how long the previous one took."""
        now = time.monotonic()
        passed = now - self._began
        if self._section == "step" and self._first_step is None:
            # The first step also builds what later steps reuse, so it bounds only the second step.
            self._first_step = passed
        elif self._section not in ("", "setup"):
            self._longest[self._section] = max(self._longest.get(self._section, 0.0), passed)
        self._section, self._began = section, now
        self.beat()

    def beat(self) -> None:
        """Report that this rank is alive and making progress."""
        self._number += 1
        limit = self.limit(self._section)
        if self._ft_monitor is not None:
            self._ft_monitor.beat(limit)
        if self._descriptor is not None:
            text = f"{self._number} {self._section} {self.step} {self.kept_step} {limit:.1f}"
            os.pwrite(self._descriptor, text.ljust(_BYTES).encode(), 0)

    def limit(self, section: str) -> float:
        """Return how long a section may go without a beat, in seconds."""
        longest = self._longest.get(section, self._first_step if section == "step" else None)
        if longest is None:
            return max(self._setup, self._floor)
        return max(self._floor, self._factor * longest)
