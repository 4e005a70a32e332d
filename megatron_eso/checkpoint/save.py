"""Write checkpoints, in the background if configured, and remove those no longer wanted.

A save goes through three phases that all ranks agree on. First every rank writes its shard (in a forked
process when asynchronous). Then rank 0 publishes (in a thread: small files, check of the lease, manifest,
and last the marker). Then the save is committed. A failure in any phase, on any rank, ends that save on
all of them: its folder is removed, older checkpoints stay as they were, and training goes on. Once the save
is committed, the same thread removes older checkpoints; the next save waits for their room.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
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
from megatron_eso.checkpoint.strategy import Plan, Planner
from megatron_eso.config.schema import CheckpointConfig
from megatron_eso.errors import CheckpointError, LostLeaseError
from megatron_eso.files import write_json
from megatron_eso.launch import events, lease
from megatron_eso.parallel.exchange import any_rank, gather_messages

log = logging.getLogger(__name__)
_RENEW_SECONDS = 60.0


class Phase(Enum):
    """Where a save is; the same on every rank."""

    IDLE = "idle"
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
    child: Child | None = None
    written: Any = None
    failure: str = ""
    verdict: threading.Lock = field(default_factory=threading.Lock)
    """Held to decide between the two, of which one alone can be."""
    is_committed: bool = False
    is_given_up: bool = False


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
        self._device, self._owner, self._while_waiting = device, owner, while_waiting
        self._planner, self._phase = Planner(), Phase.IDLE
        self._save: _Save | None = None
        self._thread: threading.Thread | None = None
        self._outlived: dict[Path, threading.Thread] = {}  # threads of saves that were given up
        self._renewed, self._lost_lease = time.monotonic(), ""

    @property
    def is_saving(self) -> bool:
        """True while a save is neither committed nor has failed."""
        return self._phase in (Phase.WRITING, Phase.PUBLISHING)

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
        self._save, self._phase = _Save(folder, sidecar, plan, begin), Phase.WRITING
        try:
            if self.settings.asynchronous:
                self._save.child = Child(plan.write)
            else:
                self._save.written = plan.write()
        except Exception as error:  # reported by every rank at the next poll: nothing is swallowed
            self._save.failure = f"{type(error).__name__}: {error}"
        if not self.settings.asynchronous:
            self.finish()
        return time.perf_counter() - begin

    def flags(self) -> list[bool]:
        """Return what this rank must tell the others: busy, failed, lease lost."""
        self._renew_lease()
        save, is_busy, failure = self._save, False, ""
        if save is not None:
            is_busy, failure = self._look(save)
        return [is_busy, bool(failure), bool(self._lost_lease)]

    def advance(self, is_busy: bool, has_failed: bool, is_lease_lost: bool) -> None:
        """Advance the save under way, given whether any rank set each of its :meth:`flags`.

        Raises:
            CheckpointError: on all ranks, if another attempt has taken over the run.
        """
        if is_lease_lost:
            self._abandon(remove_folder=False)  # the folder may now be the other attempt's
            raise CheckpointError(self._lost_lease or "rank 0 lost the lease of the run folder")
        save = self._save
        if save is None:
            return
        if has_failed:
            self._abandon()
        elif not is_busy and self._phase is Phase.WRITING:
            self._publish(save)
        elif not is_busy and self._phase is Phase.PUBLISHING:
            self.kept_step, self._phase = save.folder.step, Phase.TIDYING
            save.begin = time.perf_counter()
        elif not is_busy:
            self._save, self._phase, self._thread = None, Phase.IDLE, None

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

    def _look(self, save: _Save) -> tuple[bool, str]:
        """Return whether this rank is still busy with the phase; if it failed, also why."""
        waited = time.perf_counter() - save.begin
        is_late = waited > self.settings.timeout_seconds
        late = (
            f"not done after {waited:.0f} s (checkpoint.timeout_seconds="
            f"{self.settings.timeout_seconds:g})"
        )
        if self._phase is not Phase.WRITING:
            return self._look_at_thread(save, late if is_late else "")
        if save.child is None:
            is_busy = False
        else:
            is_busy = save.child.is_running
            if is_busy and is_late:
                save.child.kill(late)
            save.written, save.failure = save.child.result, save.child.failure
        if is_busy and is_late:
            save.failure = save.failure or late
        return is_busy, save.failure

    def _look_at_thread(self, save: _Save, late: str) -> tuple[bool, str]:
        """Return whether rank 0's thread is at work on this phase, and why it failed if it did."""
        is_alive = self._thread is not None and self._thread.is_alive()
        if self._phase is Phase.TIDYING:
            if is_alive and late:
                log.warning(
                    "removing old checkpoints under %s: %s; training goes on", self.root, late
                )
            return is_alive and not late, ""
        if is_alive and late:
            with save.verdict:
                save.is_given_up = not save.is_committed
            save.failure = late if save.is_given_up else ""
            return save.is_given_up, save.failure
        return is_alive and not save.is_committed, "" if is_alive else save.failure

    def _make(self, folder: CheckpointFolder) -> str:
        try:
            if self._owner:
                lease.require_lease(self.root, self._owner)
            outlived = self._outlived.get(folder.path)
            if outlived is not None and outlived.is_alive():
                return "an earlier save of this step, which was given up, still holds its folder"
            if folder.path.exists():
                remove(folder)
            folder.path.mkdir(parents=True)
        except LostLeaseError as error:
            self._lost_lease = str(error)
            return self._lost_lease
        except OSError as error:
            return f"its folder cannot be made: {error}"
        return ""

    def _publish(self, save: _Save) -> None:
        """Gather what the ranks wrote; rank 0 starts the thread that turns it into a checkpoint."""
        is_first = dist.get_rank() == 0
        written = [None] * dist.get_world_size() if is_first else None
        dist.gather_object(save.written, written)
        self._phase, save.written = Phase.PUBLISHING, None
        if written is not None:
            self._thread = threading.Thread(
                target=self._write_marker, args=(save, written), daemon=True
            )
            self._thread.start()

    def _write_marker(self, save: _Save, written: list[Any]) -> None:
        path, is_whole = save.folder.path, False
        try:
            save.plan.publish(path, [results for results, _ in written])
            write_json(path / SIDECAR, save.sidecar)
            if self._owner:
                lease.require_lease(self.root, self._owner)
            save.folder.commit(
                {name: entry for _, files in written for name, entry in files.items()}
            )
            is_whole = True
        except LostLeaseError as error:
            self._lost_lease = str(error)
        except Exception as error:  # reported by every rank: nothing is swallowed
            save.failure = f"{type(error).__name__}: {error}"
        seconds = time.perf_counter() - save.begin
        with save.verdict:
            save.is_committed = is_whole and not save.is_given_up
        if not save.is_committed and not self._lost_lease:
            # If it was given up, the run may have gone back since, and must not meet this step later.
            self._discard(save.folder)
        if save.is_committed:
            log.info("checkpoint %s committed after %.1f s", path, seconds)
            events.record(self.root.parent, "committed", step=save.folder.step, seconds=seconds)
            self._prune(save.folder.step)

    def _prune(self, step: int) -> None:
        last, every = self.settings.keep_last, self.settings.keep_every_steps
        try:
            prune(self.root, keep_last=last, keep_every_steps=every, up_to=step)
        except OSError as error:
            log.warning("old checkpoints under %s could not be removed: %s", self.root, error)

    def _discard(self, folder: CheckpointFolder) -> None:
        try:
            remove(folder)
        except OSError as error:
            log.warning("%s, which is no checkpoint, could not be removed: %s", folder.path, error)

    def _abandon(self, *, remove_folder: bool = True) -> None:
        """End the save under way without a result, on all ranks."""
        save, phase, self._save, self._phase = self._save, self._phase, None, Phase.IDLE
        if save is None or phase is Phase.TIDYING:  # that one is committed
            return
        if save.child is not None:
            save.child.kill("another rank failed")
        dist.barrier()  # from here on, no rank writes into the folder
        if self._thread is not None and self._thread.is_alive():
            self._outlived[save.folder.path] = self._thread  # it removes the folder when it ends
        elif dist.get_rank() == 0 and remove_folder:
            self._discard(save.folder)
        self._thread = None
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

    def _renew_lease(self) -> None:
        if not self._owner or dist.get_rank() or time.monotonic() - self._renewed < _RENEW_SECONDS:
            return
        self._renewed = time.monotonic()
        try:
            lease.require_lease(self.root, self._owner)
        except LostLeaseError as error:
            self._lost_lease = str(error)
        except OSError as error:
            log.warning("the lease of %s could not be renewed: %s", self.root, error)
