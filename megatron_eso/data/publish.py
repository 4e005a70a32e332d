"""``data prepare`` into an object store: each finished partition's shards are uploaded, manifests last.

Shards keep their partition's name (``part-00003-shard.00000.mds``), since their place in the split is
known only at the end; the index gives their order. The request (``prepare.json``) is uploaded first, so
that another request is refused from any machine.
"""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from megatron_eso.data.manifest import INDEX_NAME, MANIFEST_NAME, Manifest, parse_manifest
from megatron_eso.data.object_store import ObjectFolder, StoreError, speaks_s3
from megatron_eso.errors import DataError
from megatron_eso.files import parse_json

log = logging.getLogger(__name__)
ATTEMPTS = 6
FIRST_PAUSE_SECONDS = 0.5
TIMEOUT_SECONDS = 120.0  # for one attempt; a shard is below 4 GiB, and usually 64 MiB
Result = TypeVar("Result")


class Destination:
    """The address that receives a prepared data set."""

    def __init__(self, address: str) -> None:
        """Check that this program can write to the address; nothing is sent yet.

        Raises:
            DataError: for a kind of store that cannot be written to.
        """
        if not speaks_s3(address):
            raise DataError(
                f"--out {address}: data prepare writes to local folders, s3://, and gs:// with "
                "GCS_KEY and GCS_SECRET set (keys of Google's S3-compatible interface); for another "
                "store prepare into a local folder and copy it there"
            )
        self.address = address.rstrip("/")
        self._folder = ObjectFolder.open(self.address, TIMEOUT_SECONDS)

    def read(self, name: str) -> bytes | None:
        """Return an object's content, or None if there is no such object."""
        try:
            return self._try(name, lambda: self._folder.get(name), "read")
        except DataError as error:
            if isinstance(error.__cause__, StoreError) and error.__cause__.is_missing:
                return None
            raise

    def write(self, name: str, content: bytes) -> None:
        """Store an object."""
        self._try(name, lambda: self._folder.put(name, content), "written")

    def claim(self, request_name: str, request: dict[str, Any]) -> dict[str, Any] | None:
        """Return the earlier request at the address (empty: damaged); if none, write ours and return None.

        Raises:
            DataError: if the address holds objects that ``data prepare`` did not make.
        """
        content, mine = self.read(request_name), _json(request)
        if content is None:
            if not self._try("", self._folder.is_empty, "listed"):
                raise DataError(
                    f"{self.address} is not empty and was not made by data prepare; choose another --out"
                )
            put = self._try(
                request_name, lambda: self._folder.put_new(request_name, mine), "written"
            )
            if put:
                return None
            content = self.read(request_name) or b""  # another host was quicker: its request
        return parse_json(content.decode(errors="replace"))

    def replace(self, request_name: str, request: dict[str, Any], names: list[str]) -> None:
        """Remove what another request left, in the order of ``names``; then write our request."""
        for name in names:
            self._try(name, lambda name=name: self._folder.remove(name), "removed")
        self.write(request_name, _json(request))

    def manifests(self, splits: tuple[str, ...]) -> dict[str, Manifest] | None:
        """Return the manifests of all splits, or None if one is missing."""
        found = {}
        for split in splits:
            name = f"{split}/{MANIFEST_NAME}"
            content = self.read(name)
            if content is None:
                return None
            found[split] = parse_manifest(content, f"{self.address}/{name}")
        return found

    def send_shards(self, part: Path, part_name: str, splits: tuple[str, ...]) -> None:
        """Upload a written partition's shards and remove the local ones; their indexes stay."""
        for split in splits:
            for entry in json.loads((part / split / INDEX_NAME).read_text())["shards"]:
                local = part / split / stored_name(entry)
                self.write(f"{split}/{stored_name(renamed(entry, part_name))}", local.read_bytes())
                local.unlink()

    def send_split(self, folder: Path, split: str) -> None:
        """Upload a split's index, then its manifest."""
        for name in (INDEX_NAME, MANIFEST_NAME):
            self.write(f"{split}/{name}", (folder / split / name).read_bytes())

    def _try(self, name: str, call: Callable[[], Result], what: str) -> Result:
        pause, attempt = FIRST_PAUSE_SECONDS, 1
        while True:
            try:
                return call()
            except StoreError as error:
                if error.is_permanent or attempt == ATTEMPTS:
                    advice = "check the address and the credentials, then " * error.is_permanent
                    raise DataError(
                        f"{self.address}/{name} could not be {what} after {attempt} of {ATTEMPTS} "
                        f"attempts: {error}; {advice}run the same command again, it continues"
                    ) from error
                log.warning("%s/%s, attempt %d: %s", self.address, name, attempt, error)
            time.sleep(pause)
            pause, attempt = 2 * pause, attempt + 1


def renamed(entry: dict[str, Any], part_name: str) -> dict[str, Any]:
    """Return a shard's index entry with the names that its files have in the store."""
    return {
        **entry,
        **{
            kind: {**entry[kind], "basename": f"{part_name}-{entry[kind]['basename']}"}
            for kind in ("raw_data", "zip_data")
            if entry[kind]
        },
    }


def stored_name(entry: dict[str, Any]) -> str:
    """Return the name of a shard's stored file: the compressed one if there is one."""
    return (entry["zip_data"] or entry["raw_data"])["basename"]


def _json(request: dict[str, Any]) -> bytes:
    return (json.dumps(request, indent=2) + "\n").encode()
