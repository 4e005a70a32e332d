"""Write files and folders that are either whole or unchanged, whatever happens meanwhile; also JSON."""

import errno
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

_PROBE_BYTES = 16 << 10


def is_remote(address: str) -> bool:
    """Return whether an address is in an object store; names of files and folders may hold a colon."""
    return "://" in address


def write_whole(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Replace a file in one step: readers find the earlier content or the new one, never a part.

    A file that already has this content is left untouched, so that a full disk does not matter then.

    Args:
        path: the file; its folder must exist.
        content: text (written as UTF-8) or bytes.
        durable: wait for the disk, so that the promise also holds after a power loss.

    Raises:
        OSError: with the file's name, if it cannot be written; the file is then unchanged.
    """
    raw = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.part")  # unique to host and process
    try:
        if path.is_file() and path.stat().st_size == len(raw) and path.read_bytes() == raw:
            return
        with open(temporary, "wb") as file:
            file.write(raw)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):  # the parent path may not be a folder
            temporary.unlink(missing_ok=True)


def require_room(folder: Path) -> None:
    """Raise unless a small file can be written in a folder; a full disk still takes empty files.

    Raises:
        OSError: if the file cannot be written.
    """
    probe = folder / ".write_test"
    try:
        probe.write_bytes(os.urandom(_PROBE_BYTES))
    finally:
        probe.unlink(missing_ok=True)


def write_json(path: Path, content: Any, *, durable: bool = True) -> None:
    """Write an object as indented JSON; see :func:`write_whole`."""
    write_whole(path, json.dumps(content, indent=1) + "\n", durable=durable)


def write_figure(path: Path, figure: Any, *, dpi: int) -> None:
    """Write a matplotlib figure in the format of the name's ending; see :func:`write_whole`.

    Raises:
        ValueError: if matplotlib does not know the format.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi, format=path.suffix.removeprefix(".") or "png")
    write_whole(path, buffer.getvalue(), durable=False)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty if the file is missing, damaged or holds no object."""
    try:
        return parse_json(path.read_text())
    except (OSError, UnicodeDecodeError):
        return {}


def parse_json(text: str) -> dict[str, Any]:
    """Return the JSON object that a text holds; empty if it holds none."""
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def append_json(path: Path, content: dict[str, Any]) -> None:
    """Append an object to a file as one line of JSON.

    It is a single write, so processes that append at the same time do not mix their lines.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, (missing_newline(path) + json.dumps(content) + "\n").encode())
    finally:
        os.close(descriptor)


def missing_newline(path: Path) -> str:
    """Return the newline to write first if a crash cut the last line off, else an empty string."""
    with open(path, "rb") as file:
        if not file.seek(0, os.SEEK_END):
            return ""
        file.seek(-1, os.SEEK_END)
        return "" if file.read(1) == b"\n" else "\n"


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects in a file's lines; a line that a crash cut off is left out.

    No file is no lines.
    """
    try:
        lines = path.read_text(errors="replace").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [content for line in lines if (content := parse_json(line))]


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder that takes the name ``out`` when the block ends without an error, else vanishes.

    It lies in a private folder beside ``out``, so that no folder of another process or user is touched.

    Args:
        out: absent, or an empty folder, which may be ``.``.

    Raises:
        OSError: naming ``out``, if it holds anything or cannot be made; errors of the block pass through.
    """
    out = Path(os.path.realpath(out))  # to lie beside a link's target; "." has no name
    private: Path | None = None
    try:
        with _naming(out):
            if out.exists() and any(out.iterdir()):
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
            out.parent.mkdir(parents=True, exist_ok=True)
            private = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
            folder = private / out.name  # with the permissions of any new folder, unlike its parent
            folder.mkdir()
        yield folder
        with _naming(out):
            is_here = out.is_dir() and Path.cwd() == out
            folder.rename(out)  # over an empty folder too
            if is_here:
                os.chdir(out)  # the rename replaced the working folder
    finally:
        if private is not None:
            shutil.rmtree(private, ignore_errors=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
