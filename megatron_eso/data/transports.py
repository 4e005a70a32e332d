"""How the files of one split are fetched: S3-compatible stores, others by streaming, local folders.

S3 is not left to streaming's downloader because a stalled body must end the attempt, and because a
missing object or wrong credentials should be reported at once.
"""

import shutil
from pathlib import Path
from typing import Protocol
from urllib.parse import urlparse

from megatron_eso.data import streaming_shim
from megatron_eso.data.object_store import CHUNK_BYTES, ObjectFolder, StoreError, speaks_s3


class Transport(Protocol):
    """How the files of one split are fetched."""

    def fetch(self, name: str, target: Path) -> None:
        """Write the named file to ``target``; OSError is for the target alone.

        Raises:
            StoreError: if the file could not be had whole.
        """
        ...


def transport_for(address: str, *, timeout_seconds: float) -> Transport:
    """Return the transport of an address by its scheme."""
    if urlparse(address).scheme == "":
        return FolderTransport(Path(address))
    if speaks_s3(address):
        return ObjectFolder.open(address, timeout_seconds)
    return StreamingTransport(address, timeout_seconds)


class FolderTransport:
    """A local folder, for shards that are compressed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def fetch(self, name: str, target: Path) -> None:
        """Copy the named file."""
        try:
            source = (self._folder / name).open("rb")
        except OSError as error:
            raise StoreError(error.strerror or str(error), is_permanent=True) from error
        with source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy, CHUNK_BYTES)


class StreamingTransport:
    """Any other store that mosaicml-streaming knows: gs (with Google's client), azure, oci, hf, ..."""

    def __init__(self, address: str, timeout_seconds: float) -> None:
        self._address, self._timeout_seconds = address.rstrip("/"), timeout_seconds

    def fetch(self, name: str, target: Path) -> None:
        """Fetch the named file with streaming's downloader."""
        try:
            streaming_shim.download(f"{self._address}/{name}", target, self._timeout_seconds)
        except OSError:
            raise
        except Exception as error:  # each store's client has its own exceptions
            raise StoreError(f"{type(error).__name__}: {error}", is_permanent=False) from error
