"""Which files of a folder are read, which kind a file is by its name, and its decompressed bytes."""

import gzip
import zlib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from shlex import join, quote
from typing import BinaryIO

from megatron_eso.data.zstd import open_zstd
from megatron_eso.errors import DataError

COMPRESSIONS = (".gz", ".zst")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
KINDS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "lines"),
    ".parquet": "parquet",
    ".arrow": "arrow",
}
# Kinds of files that are not read here; taken as text, their raw bytes would be trained on.
CONTAINERS = frozenset(
    {
        *(".bz2", ".xz", ".lzma", ".lz4", ".br", ".snappy", ".z", ".zip", ".7z", ".rar", ".tar", ".tgz"),
        *(".tbz", ".tbz2", ".txz", ".csv", ".tsv", ".feather", ".orc", ".avro", ".tfrecord", ".warc"),
        *(".wet", ".wat", ".h5", ".hdf5", ".npy", ".npz", ".pkl", ".pickle", ".pt", ".safetensors"),
        *(".sqlite", ".db", ".xls", ".xlsx", ".pdf", ".doc", ".docx", ".epub"),
    }
)  # fmt: skip
READ_HERE = (
    ".jsonl, .ndjson, .json (a JSON object per line) and text, also .gz and .zst; .parquet; .arrow"
)


@dataclass(frozen=True)
class FileChoice:
    """Shell patterns for the files of a folder; ``*`` also matches a /.

    A pattern without a / is compared with names of files and folders, others with the path in the folder.
    """

    include: tuple[str, ...] = ()
    """Files to read, or folders to read completely; empty: everything."""
    exclude: tuple[str, ...] = ()
    """Files and folders to leave out; wins over ``include``."""

    def leaves_out(self, path: PurePath) -> bool:
        """Return whether a file or folder is itself excluded."""
        return any(_matches(pattern, path) for pattern in self.exclude)

    def takes(self, path: PurePath) -> bool:
        """Return whether a file, or a folder that contains it, is included."""
        places = (path, *path.parents[:-1])
        return not self.include or any(_matches(p, place) for p in self.include for place in places)

    def __str__(self) -> str:
        """Return the given options as they are typed."""
        given = (("include", self.include), ("exclude", self.exclude))
        return " ".join(f"--{name} {quote(pattern)}" for name, many in given for pattern in many)

    def in_words(self) -> str:
        """Return a description of the chosen files, to follow "files that"."""
        words = (("--include", self.include, "takes"), ("--exclude", self.exclude, "leaves"))
        return " and ".join(f"{name} {join(many)} {does}" for name, many, does in words if many)


def _matches(pattern: str, path: PurePath) -> bool:
    wanted = pattern.removeprefix("./").rstrip("/")
    return fnmatchcase(path.as_posix() if "/" in wanted else path.name, wanted)


def kind_of(path: Path) -> str:
    """Return how a file is read, judged by its name: text, lines, parquet or arrow.

    Raises:
        DataError: for a container of documents that is not supported.
    """
    name = path.name.lower()
    compression = Path(name).suffix if is_compressed(name) else ""
    suffix = Path(_without_compression(name)).suffix  # .tar for a.tar.gz
    kind = KINDS.get(suffix, "text")
    if suffix in CONTAINERS or (compression and kind in ("parquet", "arrow")):
        raise DataError(
            f"{path}: {suffix}{compression} files are not read; unpack or convert it, or leave such files "
            f"out (data prepare --exclude '*{suffix}{compression}'). What is read: {READ_HERE}"
        )
    return kind


def is_compressed(path: str) -> bool:
    """Return whether a file's name says that it is compressed."""
    return path.lower().endswith(COMPRESSIONS)


def require_json_lines(path: Path) -> None:
    """Refuse a ``.json`` file that is one value over many lines, such as an array; others pass.

    Raises:
        DataError: saying what is expected, or if the file cannot be read.
    """
    if not _without_compression(path.name.lower()).endswith(".json"):
        return
    try:
        with path.open("rb") as stored, decompressed(stored, path.name) as file:
            line = next((line for line in iter(file.readline, b"") if line.strip()), b"{}")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    line = line.removeprefix(BYTE_ORDER_MARK).strip()
    if not (line.startswith(b"{") and line.endswith(b"}")):
        raise DataError(
            f"{path} begins with {line[:20].decode(errors='replace')!r}: expected a JSON object per line; "
            "convert it (jq -c '.[]' converts an array), or leave such files out (data prepare --exclude "
            f"'{path.name}')"
        )


def decompressed(file: BinaryIO, path: str) -> BinaryIO:
    """Return an open file's decompressed bytes, by its name; the file itself if it is not compressed.

    Raises:
        DataError: if a needed package is not installed.
    """
    if path.lower().endswith(".gz"):
        return gzip.open(file, "rb")  # pyright: ignore[reportReturnType]
    if path.lower().endswith(".zst"):
        return open_zstd(file, path)
    return file


def _without_compression(name: str) -> str:
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return name
