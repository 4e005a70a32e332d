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


def row_group_bytes(path: str) -> list[int]:
    """Return the uncompressed size of each row group of a parquet file."""
    metadata = pyarrow_module("parquet").ParquetFile(path).metadata
    return [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
