"""What the ranks of one launcher have printed: an error that all of them find is printed once.

The launcher opens an unnamed file that every rank inherits, so nothing is left behind, whichever process
is killed.
"""

import fcntl
import os
import tempfile
from collections.abc import Mapping

VARIABLE = "MEGATRON_ESO_SAID"
_END = b"\0"


class Said:
    """The launcher's side."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()
        self.descriptor = self._file.fileno()
        self.variable = f"{self.descriptor}:{os.fstat(self.descriptor).st_ino}"
        """The value that ranks must find in their environment."""

    def clear(self) -> None:
        """Forget what was said."""
        os.ftruncate(self.descriptor, 0)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def is_first_to_say(text: str, environ: Mapping[str, str]) -> bool:
    """Return whether this is the first call with this text among all ranks of the same start.

    If no launcher listens, the answer is always True, so that no error is suppressed.
    """
    try:
        descriptor, number = map(int, environ.get(VARIABLE, "").split(":"))
        if os.fstat(descriptor).st_ino != number:  # another file: a process in between closed ours
            return True
        fcntl.lockf(descriptor, fcntl.LOCK_EX)
    except (ValueError, OSError):
        return True
    try:
        said = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
        own = text.encode(errors="backslashreplace") + _END
        if own in [part + _END for part in said.split(_END)[:-1]]:
            return False
        os.pwrite(descriptor, own, len(said))
        return True
    finally:
        fcntl.lockf(descriptor, fcntl.LOCK_UN)
