"""What the training loop asks of a run's checkpoints: continue, save, finish, go back."""

import json
import logging
import os
import platform
import secrets
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_eso.checkpoint.facts import facts_of
from megatron_eso.checkpoint.find import find_checkpoint_together, newest_valid_together
from megatron_eso.checkpoint.folder import CheckpointFolder, list_folders, set_aside_beyond
from megatron_eso.checkpoint.load import (
    load_first_weights,
    load_training_state,
    require_same_model,
)
from megatron_eso.checkpoint.local import LocalCopies, run_identity
from megatron_eso.checkpoint.save import Saver
from megatron_eso.checkpoint.state import collect, stored_bytes
from megatron_eso.data.reader import RowReader
from megatron_eso.errors import CheckpointError
from megatron_eso.launch import events, lease
from megatron_eso.launch.environment import is_of_job_script
from megatron_eso.launch.heartbeat import Heart
from megatron_eso.parallel.exchange import from_first_rank, raise_together
from megatron_eso.train.run_folder import RunFolder
from megatron_eso.train.session import Session, TrainState
from megatron_eso.train.training_data import require_same_data, require_same_tokenizer

log = logging.getLogger(__name__)
_ROOM = (
    1.1  # times the tensors' size, for a checkpoint's other files and what others write meanwhile
)


class Keeper:
    """Saves and restores a run's state. All ranks must call every method."""

    def __init__(
        self, session: Session, folder: RunFolder, reader: RowReader, heart: Heart
    ) -> None:
        """Prepare to save.

        Args:
            session: the run.
            folder: the run's folder; the first rank holds its lease (:meth:`RunFolder.take`).
            reader: the run's training data.
            heart: told of saves, and of waiting for them.

        Raises:
            CheckpointError: if node-local copies are configured and some node cannot write them.
        """
        self._session, self._folder, self._reader, self._heart = session, folder, reader, heart
        self._is_first = session.ranks.rank == 0
        self._owner = lease.owner_name(os.environ) if self._is_first else ""
        failure = _why_no_copies(session.config.checkpoint.local_folder)
        raise_together(failure, CheckpointError, session.torch_device)
        self.saver = Saver(
            folder.checkpoints,
            session.config.checkpoint,
            session.torch_device,
            owner=self._owner,
            while_waiting=heart.beat,
        )
        self._stored_bytes = stored_bytes(
            session.chunks,
            has_average=session.average is not None,
            group=session.layout.weights_group,
            device=session.torch_device,
        )
        self._local = None
        if session.config.checkpoint.local_folder is not None:
            run_id, course = from_first_rank(
                lambda: (run_identity(folder.checkpoints), secrets.token_hex(8)),
                session.torch_device,
            )
            data = reader.fingerprint()
            self._local = LocalCopies(session.config, folder.path, run_id, course, data)

    def resume_or_start(self) -> None:
        """Load the newest valid checkpoint; if there is none, load or draw the run's first weights.

        Raises:
            CheckpointError: if there are checkpoints but none is whole, or the next one has no room.
        """
        copies = self._newest_copies()
        folder = self._newest(unread_before=copies)
        if _step_of(folder) < copies and not self._load_local(copies, _step_of(folder)):
            copies, folder = -1, self._newest()
        shared_step = _step_of(folder)
        if shared_step < copies:
            self.saver.kept_step = shared_step
        elif folder is not None:
            self._load(folder)
            if self._is_first:
                log.info("continuing from %s", folder.path)
        else:
            self._require_none()
            self._begin()
        step = self._session.state.step
        is_all_saved = self.saver.kept_step == step >= self._session.derived.total_steps
        missing = "" if is_all_saved else self._missing_room()
        if missing:
            raise CheckpointError(f"{missing}: free space there or choose another folder")
        self._leave_behind(shared_step)

    def go_back(self) -> bool:
        """Load the newest checkpoint again; return False if there is none.

        The list of left-out steps is kept.
        """
        self.saver.finish()
        folder = self._newest()
        if folder is None:
            return False
        left_out = self._session.state.left_out
        self._load(folder)
        self._leave_behind(folder.step)
        self._session.state.left_out = sorted({*left_out, *self._session.state.left_out})
        return True

    def copy_locally(self) -> None:
        """Begin a node-local copy of the current step, if the run keeps such copies and one is due."""
        session, local = self._session, self._local
        every = session.config.checkpoint.local_every_steps
        if local is None or session.state.step % every:
            return
        begin, state = time.perf_counter(), session.state
        facts = {"state": json.loads(json.dumps(asdict(state))), "num_updates": state.num_updates}
        local.save(state.step, facts, session.chunks, session.optimizer, session.average)
        if self._is_first:
            seconds = time.perf_counter() - begin
            events.record(self._folder.path, "local_copy", step=state.step, seconds=seconds)

    def poll_kept_step(self) -> int:
        """Take in a finished node-local copy; return the step a restart would continue from, -1: none."""
        if self._local is not None:
            self._local.is_busy()
        return max(self.saver.kept_step, self._local.kept_step if self._local else -1)

    def save(self) -> float | None:
        """Begin to save the current step; return the stall in seconds, or None if nothing is written.

        That is so if the step is already kept, or the disk has no room.
        """
        session, begin = self._session, time.perf_counter()
        self._heart.enter("checkpoint")
        self.saver.finish()  # else the room that the save under way still takes would count as free
        step = session.state.step
        if self.saver.kept_step == step:
            return None
        missing = self._missing_room()
        if missing:
            if self._is_first:
                log.warning("%s; training goes on, older checkpoints stay", missing)
            return None
        state = collect(
            session.chunks, session.optimizer, session.average, session.layout.weights_group
        )
        facts = facts_of_run(session, self._reader.fingerprint(), self._folder.tokenizer)
        self.saver.save(step, state, facts)
        stall = time.perf_counter() - begin
        if self._is_first:
            log.info("checkpoint of step %d: training stalled for %.2f s", step, stall)
            events.record(self._folder.path, "checkpoint", step=step, seconds=stall)
        return stall

    def finish(self) -> bool:
        """Wait for the save under way; return whether the current step is kept."""
        self._heart.enter("checkpoint")
        self.saver.finish()
        return self.saver.kept_step == self._session.state.step

    def release(self) -> None:
        """Release the run's lease, unless the job script holds it, and its node-local copies."""
        if self._local is not None:
            self._local.close(remove=self.saver.kept_step == self._session.state.step)
        if self._is_first and not is_of_job_script(os.environ):
            lease.release(self._folder.checkpoints, self._owner)

    def _begin(self) -> None:
        """Load or draw the weights that a new run starts from."""
        session, settings = self._session, self._session.config.checkpoint
        if not settings.init_from:
            session.draw_weights()
            return
        try:
            folder = find_checkpoint_together(
                Path(settings.init_from), hashes=settings.verify_hashes, device=session.torch_device
            )
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint.init_from: {error}") from None
        facts = from_first_rank(folder.sidecar, session.torch_device)
        require_same_model(folder.path, facts, session.config.model)
        require_same_tokenizer(folder.path, facts, self._reader)
        kind = load_first_weights(
            folder,
            session.chunks,
            session.optimizer,
            session.average,
            session.layout.weights_group,
        )
        log.info("weights (%s) from %s", kind, folder.path)

    def _require_none(self) -> None:
        """Raise if the run has checkpoints: none could be loaded, and it must not silently start over."""
        root = self._folder.checkpoints
        names = from_first_rank(
            lambda: [f.path.name for f in list_folders(root) if f.is_committed or f.is_set_aside],
            self._session.torch_device,
        )
        if names:
            raise CheckpointError(
                f"{root} holds {len(names)} checkpoints, but none is whole ({', '.join(names)}; the lines "
                "above say why), so the run would start again from step 0. Restore their files; or, to "
                "start again, choose another folder=... or remove them"
            )

    def _leave_behind(self, shared_step: int) -> None:
        """Set aside what is newer than the state the run continues from: that course was abandoned.

        Args:
            shared_step: step of the newest whole checkpoint; later ones are not whole. -1: there is none.
        """
        root = self._folder.checkpoints
        for folder in from_first_rank(
            lambda: set_aside_beyond(root, shared_step), self._session.torch_device
        ):
            if self._is_first:
                log.warning(
                    "checkpoint %s is set aside: it is no longer used, its files stay until newer "
                    "checkpoints replace it", folder.path,
                )  # fmt: skip
        if self._local is not None:
            self._local.forget_beyond(self._session.state.step)

    def _newest_copies(self) -> int:
        """Return the step of the newest node-local copies that may be used; -1 if there are none."""
        if self._local is None or self._session.config.checkpoint.resume == "never":
            return -1
        return self._local.newest()

    def _load_local(self, step: int, shared_step: int) -> bool:
        """Load the node-local copies of a step; return whether that worked."""
        session = self._session
        assert self._local is not None
        stored = self._local.load(
            step, session.chunks, session.optimizer, session.average, session.layout.weights_group
        )
        if stored is None:
            return False
        session.state.replace_by(TrainState(**stored))
        self._heart.kept_step = self._heart.step = step
        if self._is_first:
            log.info("continuing from node-local copies of step %d (shared: %d)", step, shared_step)
        return True

    def _newest(self, *, unread_before: int = -1) -> CheckpointFolder | None:
        return newest_valid_together(
            self._folder.checkpoints,
            hashes=self._session.config.checkpoint.verify_hashes,
            device=self._session.torch_device,
            unread_before=unread_before,
        )

    def _load(self, folder: CheckpointFolder) -> None:
        session = self._session
        facts = from_first_rank(folder.sidecar, session.torch_device)
        require_same_model(folder.path, facts, session.config.model)
        require_same_data(folder.path, facts, self._reader)
        stored = facts.get("train_state")
        state = TrainState(**stored) if stored else TrainState(step=int(facts["step"]))
        load_training_state(
            folder,
            facts,
            session.chunks,
            session.optimizer,
            session.average,
            session.layout.weights_group,
            num_updates=state.num_updates,
        )
        session.state.replace_by(state)
        self.saver.kept_step = self._heart.kept_step = self._heart.step = state.step

    def _missing_room(self) -> str:
        """Return, on all ranks, why the disk has no room for one more checkpoint; empty if it has."""
        folder, step = self._folder.checkpoints, self._session.state.step
        needed = self._stored_bytes * _ROOM

        def look() -> str:
            try:
                free = shutil.disk_usage(folder).free
            except OSError as error:
                return (
                    f"no checkpoint of step {step}: the free space of {folder} is unknown: {error}"
                )
            if free >= needed:
                return ""
            return (
                f"no room for a checkpoint of step {step}: {needed / 2**30:.2f} GiB needed, "
                f"{free / 2**30:.2f} GiB free under {folder}"
            )

        return from_first_rank(look, self._session.torch_device)


def _step_of(folder: CheckpointFolder | None) -> int:
    return folder.step if folder else -1


def facts_of_run(session: Session, data: dict[str, Any], tokenizer: Path) -> dict[str, Any]:
    """Return the facts to store with a checkpoint of the run's current step.

    Args:
        session: the run.
        data: fingerprint of its training data.
        tokenizer: path of its tokenizer; the file need not exist.
    """
    return facts_of(
        session.config,
        step=session.state.step,
        has_ema=session.average is not None,
        data=data,
        tokenizer=str(tokenizer) if tokenizer.is_file() else None,
        train_state=asdict(session.state),
        num_ranks=session.ranks.world_size,
        written=time.time(),
    )


def _why_no_copies(local_folder: str | None) -> str:
    """Return why node-local copies cannot be written on this node, or an empty string."""
    if local_folder is None:
        return ""
    try:
        with tempfile.TemporaryFile(dir=local_folder):
            return ""
    except OSError as error:
        return (
            f"checkpoint.local_folder={local_folder} on {platform.node()}: {error.strerror}; it must exist "
            "on every node and be writable"
        )
