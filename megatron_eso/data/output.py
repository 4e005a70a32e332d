"""Output folders that appear whole or not at all, and what to say when one cannot be written."""

import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_eso import files
from megatron_eso.errors import DataError


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder that takes the name ``out`` when the block ends; see :func:`files.new_folder`.

    Raises:
        DataError: if ``out`` is not empty or cannot be written.
    """
    if out.is_dir() and any(out.iterdir()):
        raise DataError(f"{out} is not empty; choose another --out")
    try:
        with files.new_folder(out) as folder:
            yield folder
    except OSError as error:
        raise DataError(describe_write_error(error, out)) from error


def describe_write_error(error: OSError, folder: Path) -> str:
    """Return what to do about a failed write."""
    advice = {
        errno.ENOSPC: "the disk is full; free space and run the same command again: it continues",
        errno.EDQUOT: "the disk quota is used up; free space and run the same command again",
        errno.EACCES: "no permission; choose another --out or change its owner",
        errno.EROFS: "the file system is read-only; choose another --out",
        errno.ENOTDIR: "a file is in the way; choose another --out",
        errno.EEXIST: "a file is in the way; choose another --out",
        errno.ENOTEMPTY: "it holds files; choose another --out",
    }.get(error.errno or 0, "run the same command again: it continues")
    return f"cannot write {error.filename or folder} ({error.strerror or error}): {advice}"


def require_writable(folder: Path, what: str) -> None:
    """Create a folder and try to write there, before hours of work.

    Args:
        folder: the folder.
        what: name, for messages, of what is to be written.

    Raises:
        DataError: if the folder cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DataError(f"cannot write {what}: {error.strerror}") from error
