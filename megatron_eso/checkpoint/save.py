"""Write checkpoints, in the background if configured, and remove those no longer wanted.

A save goes through three phases that all ranks agree on:

- writing: every rank writes its shard, in a forked process if asynchronous;
- publishing: rank 0 makes the folder a checkpoint (publish.py): small files, check of the lease, manifest,
  and last the marker. Then the save is committed;
- tidying: rank 0 removes older checkpoints; the next save waits for their room.

A failure before it is committed, on any rank, ends that save on all of them: its folder is removed, older
checkpoints stay as they were, and training goes on.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_eso.checkpoint.child import Child
from megatron_eso.checkpoint.folder import (
    SIDECAR,
    CheckpointFolder,
    folder_of_step,
    prune,
    remove,
)
from megatron_eso.checkpoint.publish import Publication, discard
from megatron_eso.checkpoint.strategy import Plan, Planner
from megatron_eso.config.schema import CheckpointConfig
from megatron_eso.errors import CheckpointError, LostLeaseError
from megatron_eso.files import write_json
from megatron_eso.launch import events, lease
from megatron_eso.parallel.exchange import any_rank, gather_messages

log = logging.getLogger(__name__)


class Phase(Enum):
    """Where a save is; the same on every rank."""

    WRITING = "writing"
    PUBLISHING = "publishing"
    TIDYING = "tidying"


@dataclass
class _Save:
    """A save under way on this rank."""

    folder: CheckpointFolder
    sidecar: dict[str, Any]
    plan: Plan
    begin: float
    phase: Phase = Phase.WRITING
    child: Child | None = None
    """Writes this rank's shard, if asynchronous."""
    written: Any = None
    failure: str = ""
    publication: Publication | None = None
    """On rank 0, from publishing on."""

    def look(self, limit: float) -> bool:
        """Return whether this rank is still busy with the phase; note in ``failure`` why it failed.

        Args:
            limit: seconds that writing and publishing may take together, and then tidying.
        """
        waited, late = time.perf_counter() - self.begin, ""
        if waited > limit:
            late = f"not done after {waited:.0f} s (checkpoint.timeout_seconds={limit:g})"
        if self.phase is Phase.WRITING:
            return self._look_at_shard(late)
        if self.publication is None:  # that is rank 0's work
            return False
        if self.phase is Phase.PUBLISHING:
            is_busy, self.failure = self.publication.look(late)
            return is_busy
        is_busy = self.publication.is_alive
        if is_busy and late:
            root = self.folder.path.parent
            log.warning("removing old checkpoints under %s: %s; training goes on", root, late)
        return is_busy and not late

    def _look_at_shard(self, late: str) -> bool:
        if self.child is None:
            return False
        is_busy = self.child.is_running
        if is_busy and late:
            self.child.kill(late)
        self.written, self.failure = self.child.result, self.child.failure
        return is_busy


class Saver:
    """Writes the checkpoints of one run. All ranks must call every method."""

    def __init__(
        self,
        root: Path,
        settings: CheckpointConfig,
        device: torch.device,
        *,
        owner: str = "",
        while_waiting: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare to save.

        Args:
            root: folder of the run's checkpoints.
            settings: what is kept, and how long a save may take.
            device: device of the collectives.
            owner: owner of the lease that rank 0 must hold to publish; empty: no lease is checked.
            while_waiting: called repeatedly while waiting for a save.
        """
        self.root, self.settings = root, settings
        self.kept_step = -1
        """Step of the newest checkpoint this run committed or continued from; -1: none."""
        self._device, self._while_waiting = device, while_waiting
        self._planner = Planner()
        self._lease = lease.Held(root, owner if dist.get_rank() == 0 else "")
        self._save: _Save | None = None
        self._outlived: dict[Path, Publication] = {}  # of saves that were given up

    @property
    def is_saving(self) -> bool:
        """True while a save is neither committed nor has failed."""
        return self._save is not None and self._save.phase is not Phase.TIDYING

    def save(self, step: int, state: dict[str, Any], sidecar: dict[str, Any]) -> float:
        """Begin a checkpoint of ``step``; return how long training stalled, in seconds.

        Args:
            step: optimizer steps done.
            state: sharded state (``state.collect``).
            sidecar: facts for esolm.json.
        """
        begin = time.perf_counter()
        self.finish()
        folder = folder_of_step(self.root, step)
        failure = self._make(folder) if dist.get_rank() == 0 else ""
        if any_rank([bool(failure)], self._device)[0]:
            self._report_failure(folder, failure)
            return time.perf_counter() - begin
        plan = self._planner.plan(state, folder.path)
        self._save = save = _Save(folder, sidecar, plan, begin)
        try:
            if self.settings.asynchronous:
                save.child = Child(plan.write)
            else:
                save.written = plan.write()
        except Exception as error:  # reported by every rank at the next poll: nothing is swallowed
            save.failure = f"{type(error).__name__}: {error}"
        if not self.settings.asynchronous:
            self.finish()
        return time.perf_counter() - begin

    def flags(self) -> list[bool]:
        """Return what this rank must tell the others: busy, failed, lease lost."""
        self._lease.renew()
        save = self._save
        is_busy = save is not None and save.look(self.settings.timeout_seconds)
        # In this order: a lease is noted as lost before the phase that found it ends.
        return [is_busy, bool(save and save.failure), bool(self._lease.lost)]

    def advance(self, is_busy: bool, has_failed: bool, is_lease_lost: bool) -> None:
        """Advance the save under way, given whether any rank set each of its :meth:`flags`.

        Raises:
            CheckpointError: on all ranks, if another attempt has taken over the run.
        """
        if is_lease_lost:
            self._abandon(remove_folder=False)  # the folder may now be the other attempt's
            raise CheckpointError(self._lease.lost or "rank 0 lost the lease of the run folder")
        save = self._save
        if save is None:
            return
        if has_failed:
            self._abandon()
        elif is_busy:
            pass
        elif save.phase is Phase.WRITING:
            self._publish(save)
        elif save.phase is Phase.PUBLISHING:
            self.kept_step, save.phase = save.folder.step, Phase.TIDYING
            save.begin = time.perf_counter()
        else:
            self._save = None

    def poll(self) -> None:
        """Advance the save under way without waiting for it."""
        busy, failed, lost = any_rank(self.flags(), self._device)
        self.advance(busy, failed, lost)

    def finish(self) -> None:
        """Wait until the save under way, if any, is committed, and older ones are gone, or has failed."""
        pause = 0.005
        while self._save is not None:
            self.poll()
            self._while_waiting()
            if self._save is not None:
                time.sleep(pause)
                pause = min(pause * 2, 0.2)

    def _make(self, folder: CheckpointFolder) -> str:
        """Make the folder of a save; return why that cannot be done, or an empty string."""
        try:
            self._lease.require()
            outlived = self._outlived.get(folder.path)
            if outlived is not None and outlived.is_alive:
                return "an earlier save of this step, which was given up, still holds its folder"
            if folder.path.exists():
                remove(folder)
            folder.path.mkdir(parents=True)
        except LostLeaseError as error:
            return str(error)
        except OSError as error:
            return f"its folder cannot be made: {error}"
        return ""

    def _publish(self, save: _Save) -> None:
        """Gather what the ranks wrote; rank 0 starts to turn it into a checkpoint."""
        written = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(save.written, written)
        save.phase, save.written = Phase.PUBLISHING, None
        if written is not None:
            save.publication = Publication(
                save.folder,
                self._lease,
                save.begin,
                write=partial(self._write_marker, save.folder, save.plan, save.sidecar, written),
                remove_older=partial(self._prune, save.folder.step),
            )

    def _write_marker(
        self,
        folder: CheckpointFolder,
        plan: Plan,
        sidecar: dict[str, Any],
        written: list[Any],
    ) -> None:
        plan.publish(folder.path, [results for results, _ in written])
        write_json(folder.path / SIDECAR, sidecar)
        self._lease.require()
        folder.commit({name: entry for _, files in written for name, entry in files.items()})

    def _prune(self, step: int) -> None:
        last, every = self.settings.keep_last, self.settings.keep_every_steps
        try:
            prune(self.root, keep_last=last, keep_every_steps=every, up_to=step)
        except OSError as error:
            log.warning("old checkpoints under %s could not be removed: %s", self.root, error)

    def _abandon(self, *, remove_folder: bool = True) -> None:
        """End the save under way without a result, on all ranks."""
        save, self._save = self._save, None
        if save is None or save.phase is Phase.TIDYING:  # that one is committed
            return
        if save.child is not None:
            save.child.kill("another rank failed")
        dist.barrier()  # from here on, no rank begins to write into the folder
        if save.publication is not None and save.publication.is_alive:
            # It removes the folder when it ends.
            self._outlived[save.folder.path] = save.publication
        elif dist.get_rank() == 0 and remove_folder:
            discard(save.folder)
        self._report_failure(save.folder, save.failure)

    def _report_failure(self, folder: CheckpointFolder, failure: str) -> None:
        """Log, on rank 0, why a save failed, as told by every rank that knows."""
        everywhere = gather_messages(failure)
        if dist.get_rank() == 0:
            why = "; ".join(f"rank {n}: {text}" for n, text in enumerate(everywhere) if text)
            log.warning(
                "SAVE FAILED: checkpoint %s was not written (%s). Training goes on; older checkpoints "
                "are as they were", folder.path, why,
            )  # fmt: skip
            events.record(self.root.parent, "save_failed", step=folder.step, why=why)
