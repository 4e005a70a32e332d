"""A checkpoint as files: names, manifest, commit marker, retention. No torch, no ranks.

    checkpoints/step_0000000100/
        __0_0.distcp ... .metadata common.pt metadata.json   written by Megatron (torch_dist)
        esolm.json      what the tensors are: architecture, objective, vocabulary, step
        MANIFEST.json   size and hash of every other file
        COMMITTED       written last; a folder without it does not count
        SET_ASIDE       COMMITTED renamed, after a run went on from an older checkpoint

Folders are never renamed: object-store file systems cannot.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_eso.data.manifest import sha256_of
from megatron_eso.errors import CheckpointError
from megatron_eso.files import write_json, write_whole

MANIFEST, MARKER, SIDECAR = "MANIFEST.json", "COMMITTED", "esolm.json"
SET_ASIDE = "SET_ASIDE"
FORMAT_VERSION = 1
_NAME = re.compile(r"step_(\d{10})")


@dataclass(frozen=True)
class CheckpointFolder:
    """One checkpoint folder."""

    path: Path

    @property
    def step(self) -> int:
        """Steps done when it was written."""
        match = _NAME.fullmatch(self.path.name)
        return int(match.group(1)) if match else int(self.sidecar()["step"])

    @property
    def is_committed(self) -> bool:
        """True once everything was written."""
        return (self.path / MARKER).is_file()

    @property
    def is_set_aside(self) -> bool:
        """True if it was committed, and a run has since gone on from an older one."""
        return (self.path / SET_ASIDE).is_file()

    def set_aside(self) -> None:
        """Stop counting it, but keep its files: what looks damaged may only be unreadable from here."""
        (self.path / MARKER).replace(self.path / SET_ASIDE)

    def sidecar(self) -> dict[str, Any]:
        """Return the content of esolm.json, which describes the tensors.

        Raises:
            CheckpointError: if the file is missing, unreadable, damaged or of a newer format.
        """
        return read_sidecar(self.path)

    def damage(self, *, hashes: bool) -> str:
        """Return what is wrong with the files, or an empty string.

        Args:
            hashes: also read every file and compare its hash.
        """
        if not self.is_committed and self.is_set_aside:
            return (
                "it was set aside when a run found it damaged and went on from an older one; to use it "
                f"anyway, rename its {SET_ASIDE} to {MARKER}"
            )
        if not self.is_committed:
            return "it was never committed (the save did not finish)"
        try:
            entries = self._manifest()
        except (OSError, ValueError) as error:
            return f"its {MANIFEST} cannot be read: {error}"
        for name, entry in entries.items():
            file = self.path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}"
        return self.changed_file(self.hashes()) if hashes else ""

    def hashes(self) -> dict[str, str]:
        """Return every file's hash from the manifest, the largest files first."""
        entries = sorted(self._manifest().items(), key=lambda item: -item[1]["bytes"])
        return {name: entry["xxh3_128"] for name, entry in entries}

    def changed_file(self, expected: Mapping[str, str]) -> str:
        """Return which file does not have its expected hash, or an empty string."""
        for name, value in expected.items():
            try:
                found = hash_file(self.path / name)
            except OSError as error:
                return f"{name} cannot be read: {error}"
            if found != value:
                return f"{name} has another hash than when it was written"
        return ""

    def _manifest(self) -> dict[str, dict[str, Any]]:
        """Return size and hash of every file.

        Raises:
            OSError: if there is no manifest.
            ValueError: if it is not what :meth:`commit` writes.
        """
        content = json.loads((self.path / MANIFEST).read_text())
        entries = content.get("files") if isinstance(content, dict) else None
        if not isinstance(entries, dict) or not entries:
            raise ValueError("it does not list the checkpoint's files")
        for name, entry in entries.items():
            fields = entry if isinstance(entry, dict) else {}
            size, value = fields.get("bytes"), fields.get("xxh3_128")
            if not isinstance(size, int) or not isinstance(value, str):
                raise ValueError(f"it does not say the size and the hash of {name}")
        return entries

    def commit(self, known: dict[str, dict[str, Any]] | None = None) -> None:
        """Write the manifest of everything in the folder, then the marker.

        Args:
            known: manifest entries of files that their writers have flushed and hashed.

        Raises:
            OSError: if a file cannot be written, or has another size than its writer left.
        """
        files = sorted(p for p in self.path.iterdir() if p.name not in (MANIFEST, MARKER))
        entries = dict(known or {})
        for name, entry in entries.items():
            if (self.path / name).stat().st_size != entry["bytes"]:
                raise OSError(f"{name} is not as long as when it was written")
        for p in files:
            if p.name not in entries:
                _flush(p)
                entries[p.name] = {"bytes": p.stat().st_size, "xxh3_128": hash_file(p)}
        write_json(self.path / MANIFEST, {"files": entries})
        write_whole(self.path / MARKER, "")


def folder_of_step(root: Path, step: int) -> CheckpointFolder:
    """Return the folder for a step; it need not exist."""
    return CheckpointFolder(root / f"step_{step:010d}")


def list_folders(root: Path) -> list[CheckpointFolder]:
    """Return the checkpoint folders under ``root``, committed or not, oldest first."""
    if not root.is_dir():
        return []
    return [CheckpointFolder(p) for p in sorted(root.iterdir()) if _NAME.fullmatch(p.name)]


def set_aside_beyond(root: Path, step: int) -> list[CheckpointFolder]:
    """Set aside every committed checkpoint of a later step than ``step``; return them.

    They were passed over as damaged. If left alone, they would count as the newest: retention would keep
    them, and a later restart might continue from one, on a course that the run has abandoned.
    """
    later = [f for f in list_folders(root) if f.is_committed and f.step > step]
    for folder in later:
        folder.set_aside()
    return later


def prune(
    root: Path, *, keep_last: int, keep_every_steps: int | None, up_to: int | None = None
) -> list[Path]:
    """Remove the :func:`unwanted` checkpoints; return the removed folders."""
    removed = unwanted(root, keep_last=keep_last, keep_every_steps=keep_every_steps, up_to=up_to)
    for folder in removed:
        remove(folder)
    return [folder.path for folder in removed]


def unwanted(
    root: Path,
    *,
    keep_last: int,
    keep_every_steps: int | None,
    up_to: int | None = None,
    hashes: bool = False,
) -> list[CheckpointFolder]:
    """Return checkpoints older than those to keep, and uncommitted ones older than the newest whole one.

    Only whole checkpoints are counted: none is given up for a damaged one.

    Args:
        root: folder of a run's checkpoints.
        keep_last: number of the newest whole checkpoints to keep.
        keep_every_steps: keep committed checkpoints at multiples of this many steps.
        up_to: neither count nor return later steps; None: no limit.
        hashes: read every file of those to keep; a checkpoint with a changed hash is not whole.
    """
    folders = [f for f in list_folders(root) if up_to is None or f.step <= up_to]
    whole = (folder for folder in reversed(folders) if not folder.damage(hashes=hashes))
    kept = [folder.step for folder in islice(whole, keep_last)]
    found = []
    for folder in folders if kept else []:
        if folder.is_committed:
            is_milestone = keep_every_steps and folder.step % keep_every_steps == 0
            is_old = len(kept) == keep_last and folder.step < kept[-1] and not is_milestone
        else:
            is_old = folder.step < kept[0]  # a newer one may be a save under way
        if is_old:
            found.append(folder)
    return found


def remove(folder: CheckpointFolder) -> None:
    """Delete a checkpoint, its marker first, so that a half-deleted one never counts."""
    (folder.path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder.path, ignore_errors=True)


def tokenizer_path(folder: CheckpointFolder) -> Path | None:
    """Return the path of the run's tokenizer, which may be gone; None if none is known.

    It is in the run's folder, wherever that is now; an imported checkpoint keeps it in its own folder.

    Raises:
        CheckpointError: if the file there is not the model's tokenizer.
    """
    sidecar = folder.sidecar()
    named = sidecar.get("tokenizer")
    if named is None:
        return None
    if "origin" in sidecar:
        return folder.path / named
    places = [folder.path.absolute().parents[1] / Path(named).name, Path(named)]
    found = [place for place in places if place.is_file()]
    wanted = sidecar.get("data", {}).get("tokenizer")
    right = [place for place in found if wanted in (None, sha256_of(place))]
    if found and not right:
        raise CheckpointError(
            f"{found[0]} is not the tokenizer that {folder.path} was trained with (sha256 {wanted}); put "
            "that one back"
        )
    return right[0] if right else Path(named)


def read_sidecar(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint folder's esolm.json; see :meth:`CheckpointFolder.sidecar`."""
    file = path / SIDECAR
    try:
        sidecar = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{path} holds no {SIDECAR}: it is not a checkpoint of this trainer"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None
    if not isinstance(sidecar, dict):
        raise CheckpointError(f"{file} is damaged: it holds no object")
    if sidecar.get("format_version", 0) > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format {sidecar['format_version']}; this version reads up to "
            f"{FORMAT_VERSION}: update megatron-eso"
        )
    return sidecar


def _flush(path: Path) -> None:
    """Wait until a file is on the disk: without it, a checkpoint that outlives a power loss is damaged."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    """Return the xxh3_128 hash of a file's content."""
    try:
        import xxhash  # may be missing on a login node, where checkpoints are listed and pruned
    except ImportError:
        raise CheckpointError(
            "hashes cannot be compared without the package xxhash: `pip install xxhash`, or give "
            "--no-hashes to check the sizes of files only"
        ) from None
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(8 << 20):
            digest.update(block)
    return digest.hexdigest()
