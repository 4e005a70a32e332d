"""Fetching one file of a remote split: S3-compatible stores, others by streaming, local folders.

Each attempt is bounded in time and gives either the whole file or an error that says whether trying
again can help. S3 has its own few lines because a stalled body must end the attempt, and because a
missing object or wrong credentials should be reported at once.
"""

import os
import shutil
import time
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from megatron_eso.data import streaming_shim
from megatron_eso.errors import DataError

CHUNK_BYTES = 1 << 20
PERMANENT_STATUS = (400, 401, 403, 404)


class FetchError(Exception):
    """An attempt failed; ``is_permanent`` tells that another one would fail too."""

    def __init__(self, message: str, *, is_permanent: bool) -> None:
        super().__init__(message)
        self.is_permanent = is_permanent


class Transport(Protocol):
    """How the files of one split are fetched."""

    def fetch(self, name: str, target: Path) -> None:
        """Write the named file to ``target``; OSError is for the target alone.

        Raises:
            FetchError: if the file could not be had whole.
        """
        ...


def transport_for(address: str, *, timeout_seconds: float) -> Transport:
    """Return the transport of an address by its scheme."""
    scheme = urlparse(address).scheme
    if scheme == "":
        return FolderTransport(Path(address))
    if scheme == "s3":
        return S3Transport(address, timeout_seconds)
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
            raise FetchError(error.strerror or str(error), is_permanent=True) from error
        with source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy, CHUNK_BYTES)


class StreamingTransport:
    """Any store that mosaicml-streaming knows: gs, azure, oci, hf, sftp, ..."""

    def __init__(self, address: str, timeout_seconds: float) -> None:
        self._address, self._timeout_seconds = address.rstrip("/"), timeout_seconds

    def fetch(self, name: str, target: Path) -> None:
        """Fetch the named file with streaming's downloader."""
        try:
            streaming_shim.download(f"{self._address}/{name}", target, self._timeout_seconds)
        except OSError:
            raise
        except Exception as error:  # each store's client has its own exceptions
            raise FetchError(f"{type(error).__name__}: {error}", is_permanent=False) from error


class S3Transport:
    """An S3-compatible store; S3_ENDPOINT_URL chooses another one than AWS."""

    def __init__(self, address: str, timeout_seconds: float) -> None:
        parts = urlparse(address)
        self._bucket, self._prefix = parts.netloc, parts.path.strip("/")
        self._timeout_seconds = timeout_seconds
        self._client = s3_client(timeout_seconds)

    def fetch(self, name: str, target: Path) -> None:
        """Fetch the named object within the time limit."""
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
        from urllib3.exceptions import HTTPError

        deadline = time.monotonic() + self._timeout_seconds
        key = f"{self._prefix}/{name}" if self._prefix else name
        try:
            answer = self._client.get_object(Bucket=self._bucket, Key=key)
            with target.open("wb") as file:
                self._copy(answer, file, deadline)
        except ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            message = f"HTTP {status} {error.response.get('Error', {}).get('Code', '')}"
            raise FetchError(message, is_permanent=status in PERMANENT_STATUS) from error
        except NoCredentialsError as error:
            raise FetchError("no credentials were found", is_permanent=True) from error
        except (BotoCoreError, HTTPError, ConnectionError, TimeoutError) as error:
            raise FetchError(f"{type(error).__name__}: {error}", is_permanent=False) from error

    def _copy(self, answer: dict[str, Any], file: Any, deadline: float) -> None:
        # The raw stream gives what has arrived; boto's own read waits for a full chunk, so that a
        # trickle would outlast any limit.
        body = answer["Body"]._raw_stream
        num_bytes = 0
        while chunk := body.read1(CHUNK_BYTES):
            file.write(chunk)
            num_bytes += len(chunk)
            if time.monotonic() > deadline:
                body.close()
                raise FetchError(
                    f"{num_bytes} of {answer['ContentLength']} bytes came in "
                    f"{self._timeout_seconds:g} s (data.timeout_seconds)",
                    is_permanent=False,
                )
        if num_bytes != answer["ContentLength"]:
            message = f"the body ended after {num_bytes} of {answer['ContentLength']} bytes"
            raise FetchError(message, is_permanent=False)


def s3_client(timeout_seconds: float) -> Any:
    """Return a boto3 client that makes one attempt per call.

    Raises:
        DataError: if boto3 is missing.
    """
    try:
        from boto3.session import Session
        from botocore.config import Config
    except ImportError:
        raise DataError("s3:// addresses need boto3: pip install 'megatron-eso[s3]'") from None
    config = Config(
        connect_timeout=timeout_seconds,
        read_timeout=timeout_seconds,
        retries={"total_max_attempts": 1},
        s3={"addressing_style": "path"} if os.environ.get("S3_ENDPOINT_URL") else None,
    )
    return Session().client("s3", config=config, endpoint_url=os.environ.get("S3_ENDPOINT_URL"))
