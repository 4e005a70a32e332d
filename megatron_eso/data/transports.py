"""How the files of one split are fetched: from S3-compatible stores, others by streaming, local folders.

S3 is not left to streaming's downloader because a stalled body must end the attempt, and because a
missing object or wrong credentials should be reported immediately.
"""

import errno
import os
import shutil
import threading
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from megatron_eso.data import streaming_shim
from megatron_eso.data.object_store import (
    CHUNK_BYTES,
    PERMANENT_STATUS,
    ObjectFolder,
    StoreError,
    speaks_s3,
)
from megatron_eso.errors import DataError
from megatron_eso.files import is_remote

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE)
_CLIENTS = {
    "gs": "Google's client (pip install -e '.[gs]'), or GCS_KEY and GCS_SECRET",
    "azure": "pip install azure-storage-blob azure-identity",
    "azure-dl": "pip install azure-storage-file-datalake azure-identity",
    "hf": "pip install huggingface_hub",
    "oci": "pip install oci",
}


class Transport(Protocol):
    """How the files of one split are fetched."""

    def fetch(self, name: str, target: Path) -> None:
        """Write the named file to ``target``.

        Raises:
            StoreError: if the whole file could not be fetched.
            OSError: only if the target cannot be written.
        """
        ...


def transport_for(address: str, *, timeout_seconds: float) -> Transport:
    """Return the transport for an address, chosen by its scheme."""
    if not is_remote(address):
        return FolderTransport(Path(address))
    if speaks_s3(address):
        return ObjectFolder.open(address, timeout_seconds)
    return StreamingTransport(address, timeout_seconds)


class FolderTransport:
    """A local folder of compressed shards."""

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
        self._own = threading.local()

    def fetch(self, name: str, target: Path) -> None:
        """Fetch the named file with streaming's downloader."""
        target.unlink(missing_ok=True)  # the downloader takes an existing target for fetched
        try:
            self._downloader().download(
                f"{self._address}/{name}", str(target), self._timeout_seconds
            )
        except DataError:
            raise
        except Exception as error:  # each store's client has its own exceptions
            if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
                raise
            raise _store_error(error, urlparse(self._address).scheme) from error

    def _downloader(self) -> Any:
        """Return this thread's own downloader, made in this process: it holds a connection."""
        if getattr(self._own, "process", None) != os.getpid():
            self._own.downloader = streaming_shim.downloader(self._address)
            self._own.process = os.getpid()
        return self._own.downloader


def _store_error(error: Exception, scheme: str) -> StoreError:
    """Return a client's exception as a ``StoreError``; streaming itself raises three of Python's."""
    if isinstance(error, ImportError):
        client = _CLIENTS.get(scheme, "the store's client")
        return StoreError(f"{error}: {scheme}:// needs {client}", is_permanent=True)
    status = getattr(error, "code", None) or getattr(error, "status_code", None)
    is_missing = isinstance(error, FileNotFoundError) or status == 404
    return StoreError(
        f"{type(error).__name__}: {error}",
        is_permanent=is_missing or isinstance(error, ValueError) or status in PERMANENT_STATUS,
        status=404 if is_missing else status or 0,
    )
