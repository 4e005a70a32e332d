"""Objects of S3-compatible stores: s3:// and, with its interoperability keys, gs://.

One call is one attempt, limited in time. It gives a whole object, or a ``StoreError`` that says whether
another attempt can help, so callers decide how often to try. Uploads carry their MD5, which the store
checks.
"""

import hashlib
import io
import os
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlparse

from megatron_eso.errors import DataError

CHUNK_BYTES = 1 << 20
PERMANENT_STATUS = (400, 401, 403, 404)
PASSING_CODES = (
    "BadDigest",
    "RequestTimeout",
)  # these come as 400, but another attempt may succeed
_TAKEN, _NOT_IMPLEMENTED = 412, 501
GCS_ENDPOINT = "https://storage.googleapis.com"


class StoreError(Exception):
    """An attempt failed; if ``is_permanent``, another attempt would fail too."""

    def __init__(self, message: str, *, is_permanent: bool, status: int = 0) -> None:
        super().__init__(message)
        self.is_permanent = is_permanent
        self.status = status
        """HTTP status of the store's answer; 0: no answer."""

    @property
    def is_missing(self) -> bool:
        """True if there is no such object."""
        return self.status == 404


@dataclass(frozen=True)
class ObjectFolder:
    """The objects below one address."""

    address: str
    timeout_seconds: float
    client: Any

    @staticmethod
    def open(address: str, timeout_seconds: float) -> "ObjectFolder":
        """Return the folder of an address; the store is not contacted yet."""
        address = address.rstrip("/")
        return ObjectFolder(
            address, timeout_seconds, _client(urlparse(address).scheme, timeout_seconds)
        )

    def fetch(self, name: str, target: Path) -> None:
        """Write an object to a file.

        Raises:
            StoreError: if the whole object did not come within the time limit.
            OSError: only if the file cannot be written.
        """
        with _as_store_errors(), target.open("wb") as file:
            self._copy(name, file)

    def get(self, name: str) -> bytes:
        """Return the content of a small object.

        Raises:
            StoreError: if the whole object did not come within the time limit.
        """
        content = io.BytesIO()
        with _as_store_errors():
            self._copy(name, content)
        return content.getvalue()

    def put(self, name: str, content: bytes) -> None:
        """Store an object, replacing it.

        Raises:
            StoreError: if the store did not take it whole.
        """
        self._put(name, content)

    def put_new(self, name: str, content: bytes) -> bool:
        """Store an object unless one of its name exists; return whether it was stored.

        A store without this condition replaces an existing object. Google's has a different condition,
        which this client cannot send.

        Raises:
            StoreError: if the store did not take it whole.
        """
        if not self.address.startswith("s3:"):
            self.put(name, content)
            return True
        try:
            self._put(name, content, IfNoneMatch="*")
        except StoreError as error:
            if error.status not in (_TAKEN, _NOT_IMPLEMENTED):
                raise
            if error.status == _NOT_IMPLEMENTED:
                self.put(name, content)
            return error.status == _NOT_IMPLEMENTED
        return True

    def is_empty(self) -> bool:
        """Return whether there is no object below the address.

        Raises:
            StoreError: if the store refused.
        """
        place = self._place("")
        prefix = f"{place['Key']}/" if place["Key"] else ""  # empty for a whole bucket
        with _as_store_errors():
            found = self.client.list_objects_v2(Bucket=place["Bucket"], Prefix=prefix, MaxKeys=1)
        return not found.get("Contents")

    def remove(self, name: str) -> None:
        """Remove the object of this name, and all objects in the folder of this name.

        Raises:
            StoreError: if the store refused.
        """
        place = self._place(name)
        with _as_store_errors():
            pages = self.client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=place["Bucket"], Prefix=place["Key"]):
                for entry in page.get("Contents", []):
                    if entry["Key"] != place["Key"] and not entry["Key"].startswith(
                        f"{place['Key']}/"
                    ):
                        continue  # another object, whose name only begins the same
                    self.client.delete_object(Bucket=place["Bucket"], Key=entry["Key"])

    def _put(self, name: str, content: bytes, **conditions: str) -> None:
        md5 = b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()
        with _as_store_errors():
            self.client.put_object(**self._place(name), Body=content, ContentMD5=md5, **conditions)

    def _place(self, name: str) -> dict[str, str]:
        parts = urlparse(f"{self.address}/{name}")
        return {"Bucket": parts.netloc, "Key": parts.path.strip("/")}

    def _copy(self, name: str, file: BinaryIO) -> None:
        deadline = time.monotonic() + self.timeout_seconds
        answer = self.client.get_object(**self._place(name))
        # The raw stream returns what has arrived. Boto's own read waits for a full chunk, so a
        # trickle of bytes would outlast any time limit.
        body = answer["Body"]._raw_stream
        num_bytes = 0
        while chunk := body.read1(CHUNK_BYTES):
            file.write(chunk)
            num_bytes += len(chunk)
            if time.monotonic() > deadline:
                body.close()
                raise StoreError(
                    f"{num_bytes} of {answer['ContentLength']} bytes came in "
                    f"{self.timeout_seconds:g} s (data.timeout_seconds)",
                    is_permanent=False,
                )
        if num_bytes != answer["ContentLength"]:
            message = f"the body ended after {num_bytes} of {answer['ContentLength']} bytes"
            raise StoreError(message, is_permanent=False)


def speaks_s3(address: str) -> bool:
    """Return whether :class:`ObjectFolder` can read an address: s3://, or gs:// with keys."""
    scheme = urlparse(address).scheme
    has_keys = "GCS_KEY" in os.environ and "GCS_SECRET" in os.environ
    return scheme == "s3" or (scheme == "gs" and has_keys)


@contextmanager
def _as_store_errors() -> Iterator[None]:
    """Turn the client's exceptions inside the block into ``StoreError``."""
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = error.response.get("Error", {}).get("Code", "")
        raise StoreError(
            f"HTTP {status} {code}",
            is_permanent=status in PERMANENT_STATUS and code not in PASSING_CODES,
            status=status,
        ) from error
    except NoCredentialsError as error:
        raise StoreError("no credentials were found", is_permanent=True) from error
    except (BotoCoreError, HTTPError, ConnectionError, TimeoutError) as error:
        raise StoreError(f"{type(error).__name__}: {error}", is_permanent=False) from error


def _client(scheme: str, timeout_seconds: float) -> Any:
    """Return a boto3 client that makes one attempt per call."""
    try:
        from boto3.session import Session
        from botocore.config import Config
    except ImportError:
        raise DataError(f"{scheme}:// addresses need boto3: pip install -e '.[s3]'") from None
    endpoint = os.environ.get("S3_ENDPOINT_URL")
    keys: dict[str, Any] = {}
    if scheme == "gs":
        endpoint = os.environ.get("GCS_ENDPOINT_URL", GCS_ENDPOINT)
        keys = {
            "aws_access_key_id": os.environ.get("GCS_KEY"),
            "aws_secret_access_key": os.environ.get("GCS_SECRET"),
            "region_name": "auto",
        }
    config = Config(
        connect_timeout=timeout_seconds,
        read_timeout=timeout_seconds,
        retries={"total_max_attempts": 1},
        s3={"addressing_style": "path"} if endpoint else None,
        # Many compatible stores do not know newer checksums; all know ContentMD5.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return Session().client("s3", config=config, endpoint_url=endpoint, **keys)
