"""What the ranks of one launcher have printed: an error that all of them find is printed once."""

import fcntl
import os
from collections.abc import Mapping

from megatron_eso.launch.shared_file import SharedFile, inherited

VARIABLE = "MEGATRON_ESO_SAID"
_END = b"\0"


class Said:
    """The launcher's side."""

    def __init__(self) -> None:
        self.file = SharedFile(VARIABLE)

    def clear(self) -> None:
        """Forget what was said."""
        os.ftruncate(self.file.descriptor, 0)


def is_first_to_say(text: str, environ: Mapping[str, str]) -> bool:
    """Return whether this is the first call with this text among all ranks of the same start.

    If no launcher listens, the answer is always True, so that no error is suppressed.
    """
    descriptor = inherited(VARIABLE, environ)
    if descriptor is None:
        return True
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
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
