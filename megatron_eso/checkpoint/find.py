"""Which checkpoint is used: the newest one whose files are whole.

A run's ranks find it together: rank 0 lists the folders, and each rank hashes its share of the files. So
every byte is read once, by as many readers as there are ranks.
"""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_eso.checkpoint.folder import CheckpointFolder, list_folders
from megatron_eso.errors import CheckpointError
from megatron_eso.parallel.exchange import from_first_rank, gather_messages

log = logging.getLogger(__name__)


def newest_valid(root: Path, *, hashes: bool) -> CheckpointFolder | None:
    """Return the newest checkpoint whose files are whole; log why newer ones were passed over.

    Args:
        root: folder of a run's checkpoints.
        hashes: read every file and compare its hash, not only its size.
    """
    return _first_whole(_newest_first(root), lambda folder: folder.damage(hashes=hashes))


def newest_valid_together(
    root: Path, *, hashes: bool, device: torch.device, unread_before: int = -1
) -> CheckpointFolder | None:
    """Return what :func:`newest_valid` does. All ranks must call this; each hashes its share.

    Of checkpoints before step ``unread_before`` only the sizes are compared: newer copies are used instead.
    """
    folders = from_first_rank(lambda: _newest_first(root), device)
    return _first_whole(
        folders,
        lambda folder: damage_together(
            folder, hashes=hashes and folder.step >= unread_before, device=device
        ),
    )


def find_checkpoint(path: Path, *, hashes: bool = False) -> CheckpointFolder:
    """Return the checkpoint that a path means: the folder itself, or the newest whole one of a run folder.

    Raises:
        CheckpointError: if there is none, or the named one is damaged.
    """
    return _wanted(path, _meant(path), lambda folder: folder.damage(hashes=hashes))


def find_checkpoint_together(path: Path, *, hashes: bool, device: torch.device) -> CheckpointFolder:
    """Return what :func:`find_checkpoint` does. All ranks must call this; each hashes its share.

    Raises:
        CheckpointError: on all ranks, if there is none, or the named one is damaged.
    """
    meant = from_first_rank(lambda: _meant(path), device)
    return _wanted(
        path, meant, lambda folder: damage_together(folder, hashes=hashes, device=device)
    )


def damage_together(folder: CheckpointFolder, *, hashes: bool, device: torch.device) -> str:
    """Return, on every rank, what is wrong with a checkpoint's files, or an empty string.

    Args:
        folder: the same on all ranks, which must all call.
        hashes: also read every file, each rank its share, and compare the hashes.
        device: device of the collectives.
    """

    def look() -> tuple[str, dict[str, str]]:
        damage = folder.damage(hashes=False)
        return damage, folder.hashes() if hashes and not damage else {}

    damage, expected = from_first_rank(look, device)
    if damage or not expected:
        return damage
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    mine = dict(list(expected.items())[rank::num_ranks])
    return next(filter(None, gather_messages(folder.changed_file(mine))), "")


def _newest_first(root: Path) -> list[CheckpointFolder]:
    return list_folders(root)[::-1]


def _meant(path: Path) -> list[CheckpointFolder]:
    """Return the checkpoints that a path may mean, preferred first."""
    for root in (path, path / "checkpoints"):
        if folders := _newest_first(root):
            return folders
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file; give a checkpoint folder or a run folder")
    folder = CheckpointFolder(path)
    folder.sidecar()
    return [folder]


def _wanted(
    path: Path, folders: list[CheckpointFolder], damage_of: Callable[[CheckpointFolder], str]
) -> CheckpointFolder:
    if [folder.path for folder in folders] == [path]:
        damage = damage_of(folders[0])
        if damage:
            raise CheckpointError(f"checkpoint {path} cannot be used: {damage}")
        return folders[0]
    found = _first_whole(folders, damage_of)
    if found is None:
        raise CheckpointError(f"no checkpoint under {folders[0].path.parent} is whole")
    return found


def _first_whole(
    folders: Iterable[CheckpointFolder], damage_of: Callable[[CheckpointFolder], str]
) -> CheckpointFolder | None:
    is_alone = not dist.is_initialized()
    for folder in folders:
        damage = damage_of(folder)
        if not damage:
            return folder
        if is_alone or dist.get_rank() == 0:
            log.warning("checkpoint %s is passed over: %s", folder.path, damage)
    return None
