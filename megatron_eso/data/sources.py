"""Where documents come from: a list of input files, cut into independent partitions.

The cut depends only on the inputs, never on the number of processes, so the prepared rows are the
same however many work on them. A partition is a list of pieces. A piece is a file, or a range of one
(bytes of an uncompressed jsonl file, row groups of a parquet file).
"""

import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from megatron_eso.data.file_kinds import FileChoice, is_compressed, kind_of, require_json_lines
from megatron_eso.data.parquet import row_group_bytes
from megatron_eso.errors import DataError

EVERY_FILE = FileChoice()
STDLIB = "stdlib"
HUB_PREFIX = "hf:"
HUB_FORM = "hf:NAME[@CONFIGURATION][:SPLIT]"
TEXT_KEY = "text"
"""Default key or column of a record's text."""
# What Hugging Face datasets writes beside the arrow files of a saved data set.
ARROW_SIDE_FILES = ("dataset_info.json", "state.json", "dataset_dict.json")
# Folders of tests, tables of characters and the like: of little use for learning to write Python.
STDLIB_LEFT_OUT = frozenset(
    {
        *("test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "pydoc_data"),
        *("site-packages", "dist-packages", "__pycache__"),
    }
)
SMALLEST_PARTITION_BYTES = 2 << 20
LARGEST_PARTITION_BYTES = 512 << 20
PARTITIONS_AIMED_AT = 64


@dataclass(frozen=True)
class Piece:
    """A file, or the part of it from ``begin`` to ``end`` (bytes or row groups; None: to the end)."""

    path: str
    kind: str
    """text (one document), lines (jsonl), parquet or arrow."""
    key: str
    """Name of the file inside its source; decides the split of a text document."""
    num_bytes: int
    """Size of the piece, for progress and for cutting."""
    begin: int = 0
    """First byte or row group."""
    end: int | None = None
    """End of the range, exclusive."""


@dataclass(frozen=True)
class Partition:
    """The pieces that one worker turns into shards as one task."""

    number: int
    """Place among the partitions, and so among the finished shards."""
    pieces: tuple[Piece, ...]
    """What to read, in order."""

    @property
    def num_bytes(self) -> int:
        """Return the size of the inputs."""
        return sum(piece.num_bytes for piece in self.pieces)


def find_files(sources: list[str], choice: FileChoice = EVERY_FILE) -> list[Piece]:
    """Return one piece per input file, sorted within each source.

    Args:
        sources: files, folders, ``stdlib``, or ``hf:NAME[@CONFIGURATION][:SPLIT]`` for a data set
            from the Hugging Face hub.
        choice: which files of folders and of ``stdlib`` to read; a file named as a source is always read.

    Raises:
        DataError: for a source that does not exist or holds nothing.
    """
    require_sources(sources)
    if choice != EVERY_FILE and not any(s == STDLIB or os.path.isdir(s) for s in sources):
        raise DataError(
            f"{choice} chooses among the files of folders, but the sources {', '.join(sources)} are not "
            "folders; leave it out"
        )
    pieces = [piece for source in sources for piece in _files_of(source, choice)]
    if not sum(piece.num_bytes for piece in pieces):
        raise DataError(f"the sources {', '.join(sources)} hold no text (0 bytes)")
    return pieces


def require_sources(sources: list[str]) -> None:
    """Refuse a source that is neither there nor a name that stands for one.

    Raises:
        DataError: naming the source.
    """
    for source in sources:
        is_name = source == STDLIB or source.startswith(HUB_PREFIX)
        if not (is_name or os.path.isfile(source) or os.path.isdir(source)):
            raise DataError(
                f"source {source} does not exist (give a file, a folder, '{STDLIB}', or "
                f"'{HUB_FORM}' for a data set of the Hugging Face hub)"
            )


def require_records(pieces: list[Piece], text_key: str | None) -> None:
    """Refuse a text key where no file has keys.

    Args:
        pieces: the files.
        text_key: the key as given; None: none was given.

    Raises:
        DataError: naming the option.
    """
    if text_key is not None and all(piece.kind == "text" for piece in pieces):
        raise DataError(
            f"--text-key {text_key} names a key or column of records, but the sources are text files, each "
            "of them one document: leave it out (records are .jsonl, .parquet and .arrow files)"
        )


def partitions_of(pieces: list[Piece], partition_bytes: int | None = None) -> list[Partition]:
    """Return the partitions of the inputs, in order.

    Args:
        pieces: whole files.
        partition_bytes: target size; None: 1/64 of the inputs, but between 2 MiB and 512 MiB.
    """
    total = sum(piece.num_bytes for piece in pieces)
    aim = partition_bytes or min(
        max(total // PARTITIONS_AIMED_AT, SMALLEST_PARTITION_BYTES), LARGEST_PARTITION_BYTES
    )
    groups: list[list[Piece]] = [[]]
    filled = 0
    for piece in (part for whole in pieces for part in _cut(whole, aim)):
        if groups[-1] and filled + piece.num_bytes > aim:
            groups.append([])
            filled = 0
        groups[-1].append(piece)
        filled += piece.num_bytes
    return [Partition(number, tuple(group)) for number, group in enumerate(groups)]


def _files_of(source: str, choice: FileChoice) -> list[Piece]:
    if source == STDLIB:
        return _stdlib_files(Path(sysconfig.get_paths()["stdlib"]), choice)
    if source.startswith(HUB_PREFIX):
        return _hub_files(source)
    path = Path(source)
    if path.is_file():
        return [_whole(path, path.name)]
    files = list(_walk(path, choice))
    if any(file.suffix.lower() == ".arrow" for file in files):
        files = [file for file in files if file.name not in ARROW_SIDE_FILES]
    if not files:
        which = "" if choice == EVERY_FILE else f" that {choice.in_words()}"
        raise DataError(f"source folder {source} holds no files{which}")
    return [_whole(file, file.relative_to(path).as_posix()) for file in files]


def _stdlib_files(root: Path, choice: FileChoice) -> list[Piece]:
    pieces = []
    for file in _walk(root, choice):
        relative = file.relative_to(root)
        if file.suffix == ".py" and not STDLIB_LEFT_OUT.intersection(relative.parts):
            pieces.append(_whole(file, relative.as_posix()))
    pieces = [piece for piece in pieces if piece.num_bytes]  # empty __init__.py files
    if not pieces:
        which = "" if choice == EVERY_FILE else f" that {choice.in_words()}"
        raise DataError(
            f"the standard library of this Python has no source files under {root}{which}"
        )
    return pieces


def _hub_files(source: str) -> list[Piece]:
    named, _, split = source.removeprefix(HUB_PREFIX).partition(":")
    name, _, configuration = named.partition("@")
    if {"[", "+"} & set(split):
        raise DataError(
            f"source {source}: {split} is part of a split, or several; whole files are read, so name one "
            "whole split per source, and set the held-out share with --validation-fraction"
        )
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(
            f"source {source} needs the datasets package: pip install datasets"
        ) from None
    try:
        cached = load_dataset(name, configuration or None, split=split or "train").cache_files  # pyright: ignore
    except Exception as error:
        raise DataError(
            f"source {source} could not be fetched: {error} (a source of the hub is {HUB_FORM})"
        ) from error
    return [_whole(Path(entry["filename"]), Path(entry["filename"]).name) for entry in cached]


def _walk(root: Path, choice: FileChoice) -> Iterator[Path]:
    """Yield the chosen files below a folder; links are followed, but no folder is read twice."""
    seen: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(root, onerror=_refuse_folder, followlinks=True):
        status = os.stat(folder)
        is_seen = (status.st_dev, status.st_ino) in seen
        seen.add((status.st_dev, status.st_ino))
        if is_seen:
            folders.clear()
            continue
        inner = Path(folder).relative_to(root)
        for found in (folders, names):
            found[:] = sorted(
                name
                for name in found
                if not name.startswith(".") and not choice.leaves_out(inner / name)
            )
        yield from (Path(folder) / name for name in names if choice.takes(inner / name))


def _refuse_folder(error: OSError) -> NoReturn:
    raise DataError(
        f"cannot read the folder {error.filename} ({error.strerror}); change its permissions, or name "
        "the files you want"
    ) from error


def _whole(path: Path, key: str) -> Piece:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    kind = kind_of(path)
    require_json_lines(path)
    return Piece(os.path.abspath(path), kind, key, size)


def _cut(piece: Piece, aim: int) -> Iterator[Piece]:
    if piece.num_bytes <= aim or piece.kind in ("text", "arrow") or is_compressed(piece.path):
        yield piece
    elif piece.kind == "lines":
        for begin in range(0, piece.num_bytes, aim):
            end = min(begin + aim, piece.num_bytes)
            yield Piece(piece.path, piece.kind, piece.key, end - begin, begin, end)
    else:
        begin, filled = 0, 0
        sizes = row_group_bytes(piece.path)
        for group, size in enumerate(sizes):
            filled += size
            if filled >= aim or group == len(sizes) - 1:
                yield Piece(piece.path, piece.kind, piece.key, filled, begin, group + 1)
                begin, filled = group + 1, 0
