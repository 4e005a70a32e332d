"""The door to pyarrow, which only parquet and arrow inputs need."""

import importlib
from typing import Any

from megatron_eso.errors import DataError


def pyarrow_module(name: str) -> Any:
    """Return a module of pyarrow, such as ``parquet``.

    Raises:
        DataError: if pyarrow is not installed.
    """
    try:
        return importlib.import_module(f"pyarrow.{name}")
    except ImportError:
        raise DataError("parquet and arrow files need pyarrow: pip install pyarrow") from None


def open_parquet(path: str) -> Any:
    """Return pyarrow's ``ParquetFile`` for a path.

    Raises:
        DataError: if the file is damaged or cannot be read.
    """
    try:
        return pyarrow_module("parquet").ParquetFile(path)
    except (pyarrow_module("lib").ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {error}") from error


def row_group_bytes(path: str) -> list[int]:
    """Return each row group's uncompressed bytes in a parquet file; errors as in :func:`open_parquet`."""
    metadata = open_parquet(path).metadata
    return [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
