"""Runs of the tests' small model with what keeps their checkpoints, one start after the other.

A start does not give back what it holds unless it is asked to: it ends as if it were killed.
"""

import errno
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from megatron_eso.checkpoint import find as find_module
from megatron_eso.checkpoint import folder as folder_module
from megatron_eso.checkpoint import local as local_module
from megatron_eso.checkpoint import publish as publish_module
from megatron_eso.checkpoint import save as save_module
from megatron_eso.checkpoint.folder import CheckpointFolder, list_folders
from megatron_eso.checkpoint.local import LocalCopies
from megatron_eso.checkpoint.state import collect
from megatron_eso.cli.model_loading import load
from megatron_eso.errors import CheckpointError
from megatron_eso.launch.heartbeat import Heart
from megatron_eso.train import keeper as keeper_module
from megatron_eso.train.keeper import Keeper
from megatron_eso.train.run_folder import RunFolder
from megatron_eso.train.session import Session
from megatron_eso.train.step import train_step
from tests.rank_jobs import make_empty_session, read_rows
from tests.replaced import replaced
from tests.resilience.conftest import flip_a_bit

START = "resilience.keeper_jobs.start"
"""The name by which a pool of ranks knows :func:`start`."""


def start(
    folder: str,
    overrides: list[str],
    to: int,
    save_at: list[int],
    back_at: int = -1,
    damage_at_back: bool = False,
    tokenizer: str = "its hash",
    free_bytes: float = math.inf,
) -> dict[str, Any]:
    """Go on with the run of a folder to a step; return where it began, what it said and ended with.

    Args:
        folder: run folder.
        overrides: settings.
        to: last step.
        save_at: steps that are saved.
        back_at: step at which to go back to the newest checkpoint, once.
        damage_at_back: change a bit of the newest before.
        tokenizer: hash of the data's.
        free_bytes: room on the disk.
    """
    disk = SimpleNamespace(disk_usage=lambda folder: SimpleNamespace(free=free_bytes))
    with _listening() as said, replaced(((keeper_module, "shutil", disk),)):
        session = make_empty_session(overrides)
        try:
            keeper = _open(session, folder, tokenizer)
            keeper.resume_or_start()
        except CheckpointError as error:
            return {"error": str(error)}
        first, losses, went_to = session.state.step, [], -1
        while True:
            if session.state.step in save_at:
                keeper.save()
                assert keeper.finish()
            if session.state.step == back_at:
                if damage_at_back:
                    flip_a_bit(list_folders(Path(folder) / "checkpoints")[-1])
                assert keeper.go_back()
                went_to, back_at = session.state.step, -1
            if session.state.step >= to:
                break
            losses.append(train_step(session, read_rows).loss)
            keeper.copy_locally()
            _await_copy(session, keeper)
    return {
        "first": first,
        "went_to": went_to,
        "losses": losses,
        "said": said,
        "state": _state(session),
        "stored_bytes": keeper._stored_bytes,
    }


def start_without(
    rank: int, file: str, folder: str, overrides: list[str], readable: int = 0, to: int = 2
) -> dict[str, Any]:
    """Do what :func:`start` does, with files that one rank cannot open, as on a node with a bad mount.

    Args:
        rank: of the one.
        file: how their names end; of a folder: it cannot be listed.
        folder: run folder.
        overrides: settings.
        readable: so often it can be opened before.
        to: last step.
    """
    left = readable if int(os.environ["RANK"]) == rank else math.inf

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in ("open", "os.scandir") and str(arguments[0]).endswith(file):
            left -= 1
            if left < 0:
                raise OSError(errno.EIO, "Input/output error", str(arguments[0]))

    sys.addaudithook(refuse)  # which no one can take away again
    try:
        return start(folder, overrides, to, [])
    finally:
        left = math.inf


def start_with_fp8_state(folder: str, overrides: list[str], refused_by: int) -> dict[str, Any]:
    """Do what :func:`start` does to step 1, with FP8 state that one rank cannot give back."""

    def refuse(module: Any, state: Any) -> None:
        if int(os.environ["RANK"]) == refused_by:
            raise ValueError("KeyError: 'scale_fwd'")

    module = SimpleNamespace(module=None)
    doubles = (
        (local_module, "stateful_modules", lambda chunks: [module]),
        (local_module, "get_state", lambda of: torch.zeros(3, dtype=torch.uint8)),
        (local_module, "set_state", refuse),
    )
    with replaced(doubles):
        return start(folder, overrides, 1, [])


def sidecars_read(folder: str) -> int:
    """Go on with a run; return how often this rank has parsed its checkpoint's facts."""
    found, original = [], folder_module.read_sidecar

    def read(path: Path) -> dict[str, Any]:
        found.append(path)
        return original(path)

    with replaced(((folder_module, "read_sidecar", read),)):
        start(folder, [], 1, [])
    return len(found)


def loaded_for_evaluation(run: str, num_unseen: int) -> str:
    """Load a run's newest checkpoint at tensor 2, the last rank not seeing the newest ones yet."""
    original = find_module.list_folders

    def late(root: Path) -> list[Any]:
        found = original(root)
        return found[: len(found) - num_unseen] if int(os.environ["RANK"]) else found

    with replaced(((find_module, "list_folders", late),)):
        loaded = load(Path(run), use_ema=True, dtype="fp32", tensor=2, with_tokenizer=False)
    return loaded.path.name


def saved_without_an_answer(folder: str) -> list[bool]:
    """Try to save while the file system says nothing of its room, and then again; return what was."""
    session = make_empty_session([])
    keeper = _open(session, folder, "its hash")
    keeper.resume_or_start()
    session.state.step = 1

    def silent(path: Any) -> Any:
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    with replaced(((keeper_module, "shutil", SimpleNamespace(disk_usage=silent)),)):
        saved = [keeper.save() is not None]
    saved.append(keeper.save() is not None)
    return [*saved, keeper.finish()]


def saved_on_a_file_system(folder: str, slow: str, seconds: float) -> dict[str, Any]:
    """Save steps 1, 2 and 2 at a limit of 4 seconds, where one thing is slow; return what came of it.

    Args:
        folder: run folder.
        slow: ``publish``: rank 0's small files of step 2; ``remove``: taking an old checkpoint away;
            ``refuse``: publishing step 2 meets a file that it cannot use; ``stay``: nor can its folder be
            removed.
        seconds: how long that takes.
    """

    def hold(step: int) -> None:
        if step == 2 and slow == "publish":
            time.sleep(seconds)
        if step == 2 and slow in ("refuse", "stay"):
            raise CheckpointError("no hash of that file")

    commit, remove = CheckpointFolder.commit, folder_module.remove

    def slow_commit(of: CheckpointFolder, known: Any = None) -> None:
        hold(of.step)
        commit(of, known)

    def slow_remove(of: CheckpointFolder) -> None:
        time.sleep(seconds if slow == "remove" else 0)
        remove(of)

    def refused_remove(of: CheckpointFolder) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(of.path))

    removal = refused_remove if slow == "stay" else remove
    doubles = (
        (CheckpointFolder, "commit", slow_commit),
        (folder_module, "remove", slow_remove),
        (save_module, "remove", removal),
        (publish_module, "remove", removal),
    )
    with _listening() as said, replaced(doubles):
        session = make_empty_session(["checkpoint.timeout_seconds=4", "checkpoint.keep_last=1"])
        keeper = _open(session, folder, "its hash")
        keeper.resume_or_start()
        kept = []
        for step in (1, 2, 2):
            session.state.step = step
            keeper.save()
            while slow == "remove" and keeper.saver.is_saving:  # it ends before the old one is gone
                keeper.saver.poll()
                time.sleep(0.01)
            before = committed_steps(folder)
            kept.append((keeper.finish(), before, committed_steps(folder)))
        time.sleep(seconds + 0.5)
    return {"kept": kept, "said": said, "left": committed_steps(folder), "folders": _names(folder)}


def committed_steps(folder: str) -> list[int]:
    """Return the steps of a run's committed checkpoints."""
    return [f.step for f in list_folders(Path(folder) / "checkpoints") if f.is_committed]


def _names(folder: str) -> list[int]:
    return [f.step for f in list_folders(Path(folder) / "checkpoints")]


def copied_by_a_slow_rank(folder: str, overrides: list[str]) -> int:
    """Copy four steps while the last rank writes the first; return the newest copy that all have then."""
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    may_write, original = Path(folder) / "may_write", LocalCopies._write

    def write(copies: LocalCopies, *arguments: Any) -> None:
        while rank == num_ranks - 1 and not may_write.exists():
            time.sleep(0.01)
        original(copies, *arguments)

    with replaced(((LocalCopies, "_write", write),)):
        session = make_empty_session(overrides)
        keeper = _open(session, folder, "its hash")
        keeper.resume_or_start()
        copies = keeper._local
        assert copies is not None
        while session.state.step < 4:
            train_step(session, read_rows)
            keeper.copy_locally()
            while rank == 0 and copies.is_busy():
                time.sleep(0.01)
        torch.distributed.barrier()
        may_write.touch()
        while copies.is_busy():
            time.sleep(0.01)
        return copies.newest()


@contextmanager
def _listening() -> Iterator[list[str]]:
    """Collect what is logged within the context."""
    said: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("megatron_eso")
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


def _open(session: Session, folder: str, tokenizer: str) -> Keeper:
    settings = session.config.resilience
    heart = Heart(
        os.environ,
        setup_seconds=settings.setup_timeout_seconds,
        floor_seconds=settings.min_timeout_seconds,
        factor=settings.timeout_factor,
    )
    run = RunFolder(Path(folder))
    if session.ranks.rank == 0:
        run.take()
    data: Any = SimpleNamespace(fingerprint=lambda: {"rows": "made up", "tokenizer": tokenizer})
    return Keeper(session, run, data, heart)


def _await_copy(session: Session, keeper: Keeper) -> None:
    """Wait for the node-local copy under way: what it holds is then certain."""
    deadline = time.monotonic() + 60
    while session.config.checkpoint.local_folder and keeper.poll_kept_step() < session.state.step:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _state(session: Session) -> list[np.ndarray]:
    found = collect(
        session.chunks, session.optimizer, session.average, session.layout.weights_group
    )
    return [entry.data.detach().numpy().copy() for entry in found.values()]
