"""Who owns an output of ``data prepare``: the request it was made from, and the process at work on it.

The request is in ``prepare.json``, which is written first and removed last. Manifests are removed first, so
that an interrupted removal leaves nothing that looks complete.
"""

import fcntl
import logging
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from megatron_eso.data.manifest import MANIFEST_NAME, Manifest, load_manifest
from megatron_eso.data.publish import Destination
from megatron_eso.errors import DataError
from megatron_eso.files import parse_json, write_json

log = logging.getLogger(__name__)
REQUEST_NAME = "prepare.json"
TOKENIZER_NAME = "tokenizer.json"
WORK_NAME = "work"
LOCK_NAME = "prepare.lock"
FILES_KEY = "files (names and sizes)"  # in a request: a hash of these
MERGE_ORDER = ("validation", "train")  # train last: its manifest says that everything is there


def claim(
    folder: Path,
    destination: Destination | None,
    request: dict[str, Any],
    overwrite: bool,
    splits: tuple[str, ...],
) -> dict[str, Manifest] | None:
    """Record the request where the output goes; refuse if another request's output is there.

    Args:
        folder: the output, or the work in progress for ``destination``.
        destination: object store that receives the output.
        request: everything that decides the output.
        overwrite: remove what is there, also this request's output.
        splits: the splits to make.

    Returns:
        The manifests, if an earlier run with this request finished everything; else None.

    Raises:
        DataError: for another request's output, or files that ``data prepare`` did not make.
    """
    if destination is None:
        _claim_folder(folder, request, overwrite)
        return complete(folder, request, splits)
    earlier = destination.claim(REQUEST_NAME, request)
    if earlier is not None and _goes_on(earlier, request) and not overwrite:
        manifests = destination.manifests(splits)
        if manifests is not None:
            return manifests
        if earlier != request:
            destination.replace(REQUEST_NAME, request, [])
    else:  # what the staging folder says was sent is not in the store, or is about to be removed
        if earlier is not None:
            _refuse_another(destination.address, earlier, request, overwrite)
            destination.replace(REQUEST_NAME, request, [*MERGE_ORDER, TOKENIZER_NAME])
        if (folder / REQUEST_NAME).is_file():
            remove_prepared(folder)
    _claim_folder(folder, request, overwrite=not _goes_on(_request_of(folder), request))
    return None


def complete(
    folder: Path, request: dict[str, Any], splits: tuple[str, ...]
) -> dict[str, Manifest] | None:
    """Return the manifests of a local output if it has all of this request's splits, else None."""
    if not _goes_on(_request_of(folder), request):
        return None
    if not all((folder / split / MANIFEST_NAME).is_file() for split in splits):
        return None
    return {split: load_manifest(folder / split) for split in splits}


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other processes, also on other machines, from working on a folder; create it if missing.

    Raises:
        DataError: if another process is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_NAME
    while True:
        lock = open(path, "a+")
        _lock(lock, folder)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                break
        lock.close()  # its last holder has removed the file meanwhile
    with lock:
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}")
        lock.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def remove_prepared(out: Path) -> None:
    """Remove an output and its work in progress."""
    for split in MERGE_ORDER:
        (out / split / MANIFEST_NAME).unlink(missing_ok=True)
    for name in (*MERGE_ORDER, WORK_NAME):
        if (out / name).is_dir():
            shutil.rmtree(out / name)
    for name in (TOKENIZER_NAME, REQUEST_NAME):
        (out / name).unlink(missing_ok=True)


def _lock(file: TextIO, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read()
        file.close()
        raise DataError(
            f"another `data prepare` ({owner}) is at work on {folder}; wait until it ends, or choose "
            "another --out. One process starts the others: under Slurm, use srun -n1"
        ) from None
    except OSError as error:  # the file system has no locks
        log.warning(
            "%s cannot be locked (%s): start no other `data prepare` on it meanwhile",
            folder,
            error.strerror,
        )


def _claim_folder(out: Path, request: dict[str, Any], overwrite: bool) -> None:
    path = out / REQUEST_NAME
    if path.is_file():
        earlier = _request_of(out)
        if overwrite or not _goes_on(earlier, request):
            if any((out / name).exists() for name in (*MERGE_ORDER, WORK_NAME)):
                _refuse_another(str(out), earlier, request, overwrite)
            remove_prepared(out)
    elif any(entry.name != LOCK_NAME for entry in out.iterdir()):
        raise DataError(
            f"{out} is not empty and was not made by data prepare; choose another --out"
        )
    write_json(path, request)


def _request_of(folder: Path) -> dict[str, Any]:
    """Return the request that a folder was prepared from; empty if it is missing or damaged."""
    path = folder / REQUEST_NAME
    return parse_json(path.read_text(errors="replace")) if path.is_file() else {}


def _goes_on(earlier: dict[str, Any], request: dict[str, Any]) -> bool:
    """Return whether a request may go on with the work of an earlier one, which is the same or stricter.

    What was done while a bad document was an error holds none, so it is what skipping them gives. That is
    what the error advises.
    """
    key = "bad_documents"
    is_wider = earlier.get(key) == "error" and request.get(key) == "skip"
    return request == ({**earlier, key: "skip"} if is_wider else earlier)


def _refuse_another(
    out: str, earlier: dict[str, Any], request: dict[str, Any], overwrite: bool
) -> None:
    if overwrite:
        return
    keys = [key for key in request | earlier if request.get(key) != earlier.get(key)]
    changes = "; ".join(_change(key, earlier.get(key), request.get(key)) for key in keys)
    what = f"was prepared from another request ({changes})" if earlier else (
        f"holds a damaged {REQUEST_NAME}, which says what it was prepared from"
    )  # fmt: skip
    raise DataError(
        f"{out} {what}; choose another --out, or add --overwrite to remove what is there"
    )


def _change(key: str, before: Any, now: Any) -> str:
    """Return a difference of two requests: the option as it is typed, and both values."""
    if key == FILES_KEY:  # only a hash of them is kept
        return f"{key} differ"
    option = key if key == "sources" else f"--{key.replace('_', '-')}"
    return f"{option}: {_shown(before)} -> {_shown(now)}"


def _shown(value: Any) -> str:
    is_hash = isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None
    return "not given" if value is None else f"sha256 {value[:12]}" if is_hash else str(value)
