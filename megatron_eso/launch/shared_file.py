"""A file without a name that a launcher shares with its ranks, which inherit its descriptor.

Nothing is left behind, whichever process is killed. What is in it: heartbeat.py and said.py.
"""

import os
import tempfile
from collections.abc import Mapping


class SharedFile:
    """The launcher's side."""

    def __init__(self, variable: str) -> None:
        self._file = tempfile.TemporaryFile()
        self.descriptor = self._file.fileno()
        self.environment = {variable: f"{self.descriptor}:{os.fstat(self.descriptor).st_ino}"}
        """What a rank must find in its environment."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def inherited(variable: str, environ: Mapping[str, str]) -> int | None:
    """Return the descriptor of the launcher's file; None if there is no such launcher.

    A command that a rank starts finds the variable too, but its descriptor is closed or another file's.
    """
    try:
        descriptor, number = map(int, environ.get(variable, "").split(":"))
        return descriptor if os.fstat(descriptor).st_ino == number else None
    except (ValueError, OSError):
        return None
