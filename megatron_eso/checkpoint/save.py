"""Write checkpoints, beside training if asked, and keep only those that are wanted.

A save has three parts: every rank gathers its tensors (the stall), writes its file (in a child process
when asynchronous), and rank 0 writes the manifest and the marker (in a thread, since hashing takes
time). A failed save is reported and leaves older checkpoints as they are.
"""

import json
import logging
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_eso.checkpoint.folder import (
    SIDECAR,
    CheckpointFolder,
    folder_of_step,
    prune,
    remove,
    write_durably,
)
from megatron_eso.config.schema import CheckpointConfig
from megatron_eso.parallel.megatron_patches import quiet_megatron_import

with quiet_megatron_import():
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

log = logging.getLogger(__name__)


@dataclass
class _Pending:
    folder: CheckpointFolder
    sidecar: dict[str, Any]
    begin: float


class Saver:
    """Writes the checkpoints of one run; every method must be called by all ranks."""

    def __init__(self, root: Path, settings: CheckpointConfig) -> None:
        self.root, self.settings = root, settings
        self._queue = AsyncCallsQueue(persistent=False)
        self._pending: _Pending | None = None
        self._committer: threading.Thread | None = None

    def save(self, step: int, state: dict[str, Any], sidecar: dict[str, Any]) -> float:
        """Write a checkpoint of ``step``; return how long training was stalled, in seconds.

        Args:
            step: optimizer steps done.
            state: sharded state (``state.collect``).
            sidecar: description that goes into esolm.json.
        """
        begin = time.perf_counter()
        self.finish()
        folder = folder_of_step(self.root, step)
        if dist.get_rank() == 0:
            if folder.path.exists():
                remove(folder)
            folder.path.mkdir(parents=True)
        dist.barrier()
        request = dist_checkpointing.save(
            state, str(folder.path), async_sharded_save=self.settings.asynchronous
        )
        self._pending = _Pending(folder, sidecar, begin)
        if request is not None:
            self._queue.schedule_async_request(request)
        else:
            self.finish()
        return time.perf_counter() - begin

    def poll(self) -> None:
        """Commit a save whose files are written, without waiting for one that is not."""
        if self._pending is None:
            return
        self._queue.maybe_finalize_async_calls(blocking=False)
        if self._queue.get_num_unfinalized_calls() == 0:
            self._commit()

    def finish(self) -> None:
        """Wait until the save under way, if any, is committed."""
        if self._pending is not None:
            self._queue.maybe_finalize_async_calls(blocking=True)
            self._commit()
        if self._committer is not None:
            self._committer.join()
            self._committer = None
        dist.barrier()

    def _commit(self) -> None:
        pending, self._pending = self._pending, None
        dist.barrier()
        if pending is not None and dist.get_rank() == 0:
            self._committer = threading.Thread(target=self._write_marker, args=(pending,))
            self._committer.start()

    def _write_marker(self, pending: _Pending) -> None:
        folder = pending.folder
        try:
            write_durably(folder.path / SIDECAR, json.dumps(pending.sidecar, indent=1))
            folder.commit()
            prune(
                self.root,
                keep_last=self.settings.keep_last,
                keep_every_steps=self.settings.keep_every_steps,
            )
        except OSError as error:
            log.warning("checkpoint %s was not committed: %s", folder.path, error)
            shutil.rmtree(folder.path, ignore_errors=True)
            return
        seconds = time.perf_counter() - pending.begin
        log.info("checkpoint %s committed after %.1f s", folder.path, seconds)
