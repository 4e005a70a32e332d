"""The documents of one piece of input: text files, jsonl (.gz, .zst), parquet and arrow files.

A document that cannot be used (not UTF-8, empty, no text under the key) comes with its ``problem`` and
its file and line; the caller raises the problem or counts it.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

from megatron_eso.data.file_kinds import decompressed
from megatron_eso.data.parquet import open_parquet, pyarrow_module
from megatron_eso.data.sources import Piece
from megatron_eso.errors import DataError

Note = Callable[[int], None]
MOST_NAMED = 200  # characters, at most, of the keys listed in a message


@dataclass(frozen=True)
class Document:
    """One document, or why it cannot be used."""

    text: str
    """The text; empty when there is a problem."""
    where: str
    """File and line or row, for messages."""
    split_key: str
    """What decides its split: the file's name inside the source, or the text itself."""
    problem: str | None = None
    """Why it cannot be used."""


def refuse(document: Document) -> NoReturn:
    """Raise a document's problem, with advice."""
    raise DataError(
        f"{document.where}: the document {document.problem}; repair it, or leave such documents out and "
        "count them with --bad-documents skip"
    )


def documents_of(
    piece: Piece, *, text_key: str, note: Note = lambda num_bytes: None
) -> Iterator[Document]:
    """Yield the documents of a piece, in order.

    Args:
        piece: file or part of it.
        text_key: key (jsonl) or column (parquet, arrow) that holds the text.
        note: called with how many bytes of the piece have been read, as stored (compressed).

    Raises:
        DataError: if the file cannot be opened, is damaged, or lacks the column.
    """
    read = {"text": _text, "lines": _lines, "parquet": _parquet, "arrow": _arrow}[piece.kind]
    try:
        yield from read(piece, text_key, note)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {piece.path}: {error}") from error
    note(piece.num_bytes)


def _text(piece: Piece, text_key: str, note: Note) -> Iterator[Document]:
    del text_key, note
    with open(piece.path, "rb") as stored, decompressed(stored, piece.path) as file:
        data = file.read()
    yield _document(data, piece.path, split_key=piece.key)


def _lines(piece: Piece, text_key: str, note: Note) -> Iterator[Document]:
    with open(piece.path, "rb") as stored, decompressed(stored, piece.path) as file:
        if piece.begin:  # a line belongs to the range in which it starts
            file.seek(piece.begin - 1)
            file.readline()
        first, number = file.tell(), 0
        while piece.end is None or file.tell() < piece.end:
            line = file.readline()
            if not line:
                return
            number += 1
            note(stored.tell() - piece.begin)
            if not line.strip():
                continue
            document = _json_document(line, text_key)
            if document.problem is not None:
                before = _lines_before(piece.path, first) if piece.begin else 0
                where = f"{piece.path}, line {before + number}"
                yield Document("", where, "", document.problem)
            else:
                yield document


def _json_document(line: bytes, text_key: str) -> Document:
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        return Document("", "", "", f"is not UTF-8 (byte {error.start} of the line)")
    except ValueError as error:
        return Document("", "", "", f"is not JSON ({error})")
    except RecursionError:
        return Document("", "", "", "is nested too deeply to be read as JSON")
    text = record.get(text_key) if isinstance(record, dict) else None
    if text is None:
        found = (
            f"the keys {', '.join(map(repr, record))}" if isinstance(record, dict) else "no keys"
        )
        return Document("", "", "", f"{_no_text(text_key)}, it has {found[:MOST_NAMED]}")
    return _checked(text, "", text_key)


def _no_text(text_key: str) -> str:
    return f"has no text under the key '{text_key}' (set --text-key)"


def _checked(text: Any, where: str, text_key: str) -> Document:
    if isinstance(text, UnicodeDecodeError):
        return Document("", where, "", f"is not UTF-8 (byte {text.start} of the text)")
    if not isinstance(text, str):
        return Document("", where, "", _no_text(text_key))
    if not text:
        return Document("", where, "", "is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return Document("", where, "", f"is not Unicode text (character {error.start})")
    return Document(text, where, text)


def _document(data: bytes, where: str, split_key: str) -> Document:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problem = f"is not UTF-8 (line {line}, byte {error.start})"
        return Document("", where, split_key, problem)
    return Document(text, where, split_key, None if text else "is empty")


def _parquet(piece: Piece, text_key: str, note: Note) -> Iterator[Document]:
    arrow = pyarrow_module("lib")
    try:
        file = open_parquet(piece.path)
        _check_column(file.schema_arrow.names, text_key, piece.path)
        groups = range(piece.begin, file.num_row_groups if piece.end is None else piece.end)
        for group in groups:
            note(piece.num_bytes * (group - groups.start) // len(groups))
            batches = file.iter_batches(row_groups=[group], columns=[text_key], batch_size=256)
            yield from _rows(batches, text_key, f"{piece.path}, row group {group}")
    except arrow.ArrowException as error:
        raise DataError(f"{piece.path} is not a readable parquet file: {error}") from error


def _arrow(piece: Piece, text_key: str, note: Note) -> Iterator[Document]:
    arrow = pyarrow_module("lib")
    try:
        with open(piece.path, "rb") as file:
            batches = pyarrow_module("ipc").open_stream(file)
            _check_column(batches.schema.names, text_key, piece.path)
            yield from _rows(_noted(batches, file, note), text_key, piece.path)
    except arrow.ArrowException as error:
        raise DataError(f"{piece.path} is not a readable arrow stream: {error}") from error


def _noted(batches: Iterable[Any], file: BinaryIO, note: Note) -> Iterator[Any]:
    for batch in batches:
        note(file.tell())
        yield batch


def _rows(batches: Any, text_key: str, where: str) -> Iterator[Document]:
    row = 0
    for batch in batches:
        column = batch.column(batch.schema.get_field_index(text_key))
        for value in _values(column):
            yield _checked(value, f"{where}, row {row}", text_key)
            row += 1


def _values(column: Any) -> list[Any]:
    """Return a column's values; in place of one that is not UTF-8, its error."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:  # arrow does not say which value; one by one takes ten times as long
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error


def _check_column(names: list[str], text_key: str, path: str) -> None:
    if text_key not in names:
        raise DataError(
            f"{path} has no column '{text_key}', only {', '.join(names)}; set --text-key"
        )


def _lines_before(path: str, position: int) -> int:
    with open(path, "rb") as file:
        blocks = iter(lambda: file.read(min(1 << 20, position - file.tell())), b"")
        return sum(block.count(b"\n") for block in blocks)
