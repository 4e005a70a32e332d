"""Documents from text files, jsonl files, folders, or the machine's own Python standard library."""

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_eso.errors import DataError

STANDARD_LIBRARY = "stdlib"
_LEFT_OUT = {
    "test", "tests", "idle_test", "site-packages", "lib2to3", "__pycache__", "idlelib",
    "encodings", "pydoc_data",  # tables, not code
}  # fmt: skip
_SPLITS = 10_000


@dataclass(frozen=True)
class Document:
    """One document and the name that decides its split."""

    name: str
    text: str


def documents(source: str) -> Iterator[Document]:
    """Yield the documents of a source, in an order that does not depend on the file system.

    Args:
        source: ``stdlib``, a .txt/.jsonl/other text file, or a folder of such files.

    Raises:
        DataError: for a missing source, a file that is not UTF-8, or a bad jsonl line, by name.
    """
    if source == STANDARD_LIBRARY:
        yield from _standard_library()
        return
    path = Path(source)
    if not path.exists():
        raise DataError(f"source {source} does not exist (give files, folders, or 'stdlib')")
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        name = str(file.relative_to(path)) if path.is_dir() else file.name
        yield from _jsonl(file) if file.suffix == ".jsonl" else _whole_file(file, name)


def is_validation(document: Document, fraction: float) -> bool:
    """Return whether a document is held out: a function of its name alone."""
    digest = hashlib.sha256(document.name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % _SPLITS < fraction * _SPLITS


def _standard_library() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        inner = file.relative_to(root)
        if _LEFT_OUT.isdisjoint(inner.parts):
            text = file.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                yield Document(str(inner), text)


def _whole_file(file: Path, name: str) -> Iterator[Document]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None
    if text:
        yield Document(name, text)


def _jsonl(file: Path) -> Iterator[Document]:
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                raise DataError(
                    f"{file}, line {number}: expected a JSON object with a 'text' field"
                ) from None
            if text:
                yield Document(f"{file.name}:{number}", text)
