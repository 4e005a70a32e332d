"""A checkpoint as files: names, manifest, commit marker, retention. No torch, no ranks.

    checkpoints/step_0000000100/
        __0_0.distcp ... .metadata common.pt metadata.json   written by Megatron (torch_dist)
        esolm.json      what the tensors are: architecture, objective, vocabulary, step
        MANIFEST.json   size and hash of every other file
        COMMITTED       written last; a folder without it does not count

Folders are never renamed: object-store file systems cannot.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_eso.errors import CheckpointError

MANIFEST, MARKER, SIDECAR = "MANIFEST.json", "COMMITTED", "esolm.json"
FORMAT_VERSION = 1
_NAME = re.compile(r"step_(\d{10})")


@dataclass(frozen=True)
class CheckpointFolder:
    """One checkpoint folder."""

    path: Path

    @property
    def step(self) -> int:
        """Optimizer steps done when it was written."""
        match = _NAME.fullmatch(self.path.name)
        return int(match.group(1)) if match else int(self.sidecar()["step"])

    @property
    def is_committed(self) -> bool:
        """True once everything was written."""
        return (self.path / MARKER).is_file()

    def sidecar(self) -> dict[str, Any]:
        """Return the description of the tensors.

        Raises:
            CheckpointError: if it is missing, or of a newer format.
        """
        return read_sidecar(self.path)

    def damage(self, *, hashes: bool) -> str:
        """Return what is wrong with the files, or an empty string.

        Args:
            hashes: also read every file and compare its hash.
        """
        if not self.is_committed:
            return "it was never committed (the save did not finish)"
        try:
            entries = self._manifest()
        except (OSError, ValueError, KeyError) as error:
            return f"its {MANIFEST} cannot be read: {error}"
        for name, entry in entries.items():
            file = self.path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}"
        return self.changed_file(self.hashes()) if hashes else ""

    def hashes(self) -> dict[str, str]:
        """Return the hash of every file as the manifest has it, the largest files first."""
        entries = sorted(self._manifest().items(), key=lambda item: -item[1]["bytes"])
        return {name: entry["xxh3_128"] for name, entry in entries}

    def changed_file(self, expected: Mapping[str, str]) -> str:
        """Return which file does not have the hash expected of it, or an empty string."""
        for name, value in expected.items():
            try:
                found = hash_file(self.path / name)
            except OSError as error:
                return f"{name} cannot be read: {error}"
            if found != value:
                return f"{name} has another hash than when it was written"
        return ""

    def _manifest(self) -> dict[str, dict[str, Any]]:
        return json.loads((self.path / MANIFEST).read_text())["files"]

    def commit(self, known: dict[str, dict[str, Any]] | None = None) -> None:
        """Write the manifest of everything in the folder, then the marker.

        Args:
            known: manifest entries of files whose writers have hashed them.

        Raises:
            OSError: if a file cannot be written, or is not as its writer left it.
        """
        files = sorted(p for p in self.path.iterdir() if p.name not in (MANIFEST, MARKER))
        entries = dict(known or {})
        for name, entry in entries.items():
            if (self.path / name).stat().st_size != entry["bytes"]:
                raise OSError(f"{name} is not as long as it was written")
        for p in files:
            if p.name not in entries:
                entries[p.name] = {"bytes": p.stat().st_size, "xxh3_128": hash_file(p)}
        write_durably(self.path / MANIFEST, json.dumps({"files": entries}, indent=1))
        write_durably(self.path / MARKER, "")


def folder_of_step(root: Path, step: int) -> CheckpointFolder:
    """Return the folder of a step, which need not exist."""
    return CheckpointFolder(root / f"step_{step:010d}")


def list_folders(root: Path) -> list[CheckpointFolder]:
    """Return the checkpoint folders under ``root``, oldest first, committed or not."""
    if not root.is_dir():
        return []
    return [CheckpointFolder(p) for p in sorted(root.iterdir()) if _NAME.fullmatch(p.name)]


def prune(root: Path, *, keep_last: int, keep_every_steps: int | None) -> list[Path]:
    """Remove what is :func:`unwanted`; return the removed folders."""
    removed = unwanted(root, keep_last=keep_last, keep_every_steps=keep_every_steps)
    for folder in removed:
        remove(folder)
    return [folder.path for folder in removed]


def unwanted(root: Path, *, keep_last: int, keep_every_steps: int | None) -> list[CheckpointFolder]:
    """Return old committed checkpoints and uncommitted ones older than the newest."""
    folders = list_folders(root)
    committed = [folder for folder in folders if folder.is_committed]
    if not committed:
        return []
    kept = {folder.path for folder in committed[-keep_last:]}
    found = []
    for folder in folders:
        is_milestone = keep_every_steps and folder.step % keep_every_steps == 0
        if folder.is_committed and (folder.path in kept or is_milestone):
            continue
        if not folder.is_committed and folder.step >= committed[-1].step:
            continue  # a save under way
        found.append(folder)
    return found


def remove(folder: CheckpointFolder) -> None:
    """Delete a checkpoint, its marker first, so that half of one never counts."""
    (folder.path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder.path, ignore_errors=True)


def read_sidecar(path: Path) -> dict[str, Any]:
    """Return esolm.json of a checkpoint folder; see :meth:`CheckpointFolder.sidecar`."""
    file = path / SIDECAR
    try:
        sidecar = json.loads(file.read_text())
    except OSError:
        raise CheckpointError(
            f"{path} holds no {SIDECAR}: it is not a checkpoint of this trainer"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None
    if sidecar.get("format_version", 0) > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format {sidecar['format_version']}; this version reads up to "
            f"{FORMAT_VERSION}: update megatron-eso"
        )
    return sidecar


def write_durably(path: Path, text: str) -> None:
    """Write a small file so that it is whole or absent, also after a crash."""
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def hash_file(path: Path) -> str:
    """Return the xxh3_128 hash of a file's content."""
    import xxhash  # not on a login node, where checkpoints are listed and pruned

    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(8 << 20):
            digest.update(block)
    return digest.hexdigest()
