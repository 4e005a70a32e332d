"""Samples as lines of JSON: complete under the final name, or not there at all."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from megatron_eso.data.output import require_writable
from megatron_eso.errors import DataError


class SampleFile:
    """Writes samples to a file beside the final one and renames it at the end; prints its progress."""

    def __init__(self, path: Path, *, total: int) -> None:
        require_new(path)
        self._path, self._total = path, total
        self._partial = path.with_name(f".{path.name}.partial")
        self._file: TextIO | None = None
        self._done = 0

    def __enter__(self) -> "SampleFile":
        """Open the file."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._partial.open("w")
        except OSError as error:
            raise DataError(f"cannot write {self._path}: {error.strerror}") from error
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        """Close the file; give it its final name if nothing went wrong."""
        assert self._file is not None
        with self._or_say_how_far():
            self._file.close()
            if kind is None:
                self._partial.replace(self._path)
        if kind is None:
            print(f"\r{self._done} samples in {self._path}", file=sys.stderr)

    def add(self, **sample: Any) -> None:
        """Write one sample."""
        assert self._file is not None
        with self._or_say_how_far():
            self._file.write(json.dumps(sample) + "\n")
        self._done += 1
        if sys.stderr.isatty():
            print(f"\r{self._done} of {self._total} samples", end="", file=sys.stderr, flush=True)

    @contextmanager
    def _or_say_how_far(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # a full disk
            raise DataError(
                f"cannot write {self._path}: {error.strerror}; {self._partial} holds those of the "
                f"{self._done} samples that fitted"
            ) from error


def require_new(path: Path) -> None:
    """Raise if a file is there already, or cannot be made there."""
    if path.exists():
        raise DataError(f"{path} exists; choose another --out or remove it")
    require_writable(path.parent, str(path))
