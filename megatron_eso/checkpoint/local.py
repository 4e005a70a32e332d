"""Node-local copies: each rank's own shards, in memory or on a local disk, for quick restarts.

    LOCAL_FOLDER/megatron-eso-RUN/rank_00003/step_0000000120.pt      tensors of this rank
                                             step_0000000120.json    hash and layout, written last

They need no exchange between ranks, but only the same layout can read them, and a lost node loses its
part. So shared checkpoints are still needed. A restart takes the newest step that all ranks hold. Copies
outlive the folder of a removed run. So a run has a random name, kept beside its shared checkpoints, by
which it recognizes copies of another run in the same place. A node that left a run and is back may hold
copies of steps that the others have done again meanwhile. So each start has a random name too, its course:
only copies of one course are parts of one state.
"""

import hashlib
import json
import logging
import pickle
import platform
import re
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_eso.checkpoint.child import Child
from megatron_eso.checkpoint.folder import hash_file
from megatron_eso.checkpoint.state import MOMENTS
from megatron_eso.config.schema import RunConfig
from megatron_eso.errors import CheckpointError
from megatron_eso.files import write_json, write_whole
from megatron_eso.parallel.exchange import any_rank, gather_messages, together
from megatron_eso.parallel.fp8_state import get_state, set_state, stateful_modules
from megatron_eso.parallel.moving_average import MovingAverage
from megatron_eso.parallel.optimizer import write_fp8_weights
from megatron_eso.parallel.parameters import (
    device_of,
    gather_full,
    own_memory,
    set_moments,
    sharded_parameters,
    shards,
)

log = logging.getLogger(__name__)
RUN_ID = "run_id"
_KEPT = 2
_NAME = re.compile(r"step_(\d{10})")


def run_identity(checkpoints: Path) -> str:
    """Return the run's random name, drawn at the first call; only one process may call this."""
    file = checkpoints / RUN_ID
    if not file.is_file():
        write_whole(file, secrets.token_hex(8))
    return file.read_text()


class LocalCopies:
    """This rank's copies. All ranks must call every method except the constructor."""

    def __init__(
        self, config: RunConfig, run: Path, run_id: str, course: str, data: dict[str, Any]
    ) -> None:
        """Set where copies are and which ones fit.

        Args:
            config: the run, with resolved precision.
            run: run folder; its path names the copies.
            run_id: name of the run (:func:`run_identity`); copies of other runs do not fit.
            course: name of this start, the same on all ranks.
            data: fingerprint of the training data.
        """
        name = hashlib.sha256(str(run.absolute()).encode()).hexdigest()[:16]
        self._root = Path(config.checkpoint.local_folder or "") / f"megatron-eso-{name}"
        self._folder = self._root / _folder_of(dist.get_rank())
        fits = {
            "run_id": run_id,
            "num_ranks": dist.get_world_size(),
            "parallel": asdict(config.parallel),
            "model": asdict(config.model),
            "dtype": config.precision.dtype,
            "fp8": [config.precision.fp8, config.precision.fp8_attention],
            "data": data,
            "has_ema": config.optimizer.ema_decay > 0,
        }
        self._fits, self._course = json.loads(json.dumps(fits)), course
        self._child: Child | None = None
        self._step, self.kept_step = -1, -1

    def save(
        self,
        step: int,
        state: dict[str, Any],
        chunks: list[nn.Module],
        optimizer: Any,
        average: MovingAverage | None,
    ) -> None:
        """Begin a copy while training goes on, unless some rank is still writing one.

        If only that rank skipped a copy, it would soon hold no step in common with the others.

        Args:
            step: steps done.
            state: what else a restart needs, as JSON values.
            chunks: wrapped model chunks, for their FP8 state.
            optimizer: Megatron's optimizer.
            average: moving average, if the run keeps one.
        """
        is_busy = self.is_busy()
        if any_rank([is_busy], device_of(chunks))[0]:
            if is_busy:
                log.warning(
                    "no node-local copy of step %d: that of step %d is still being written",
                    step, self._step,
                )  # fmt: skip
            return
        tensors = {
            "shards": [
                [_held(part) for part in _parts(shard, average, parameter)]
                for parameter, shard in shards(optimizer).items()
            ],
            "fp8": [get_state(entry.module) for entry in stateful_modules(chunks)],
        }
        self._step = step
        try:
            self._child = Child(lambda: self._write(step, tensors, state))
        except OSError as error:
            log.warning("NODE-LOCAL COPY FAILED: step %d: %s", step, error)

    def is_busy(self) -> bool:
        """Return whether this rank is writing a copy; report a failed one, once."""
        if self._child is None:
            return False
        if self._child.is_running:
            return True
        if self._child.failure:
            log.warning("NODE-LOCAL COPY FAILED: step %d: %s", self._step, self._child.failure)
            with suppress(OSError):  # the disk is gone, say: the next copy reports it
                self._file(self._step).unlink(missing_ok=True)
        else:
            self.kept_step = self._step
        self._child = None
        return False

    def newest(self) -> int:
        """Return the newest step for which all ranks hold a whole copy of one course; -1: there is none.

        A rank that cannot list its copies holds none.
        """
        mine: list[tuple[int, str]] = []
        try:
            mine = [(step, course) for step in self._steps() if (course := self._course_of(step))]
        except OSError as error:
            log.warning("node-local copies in %s cannot be listed: %s", self._folder, error)
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, mine)
        return max((step for step, _ in set.intersection(*map(set, everywhere))), default=-1)

    def load(
        self,
        step: int,
        chunks: list[nn.Module],
        optimizer: Any,
        average: MovingAverage | None,
        group: dist.ProcessGroup,
    ) -> dict[str, Any] | None:
        """Load a copy; return the state saved with it, or None if any rank cannot use its copy."""
        owned, modules = shards(optimizer), [e.module for e in stateful_modules(chunks)]

        def read() -> tuple[dict[str, Any], dict[str, Any]]:
            header, stored = self._read(step)
            misfit = _misfit(stored, owned, average, len(modules))
            if misfit:
                raise CheckpointError(f"{self._file(step)} does not fit this run: {misfit}")
            for module, kept in zip(modules, stored["fp8"], strict=True):
                try:
                    set_state(module, kept)
                except (ValueError, RuntimeError) as error:
                    raise CheckpointError(f"{self._file(step)}: its FP8 state: {error}") from None
            return header, stored

        try:
            header, stored = together(read, device_of(chunks), CheckpointError)
        except CheckpointError as error:
            log.warning("node-local copies of step %d are passed over: %s", step, error)
            return None
        with torch.no_grad():
            for (parameter, shard), tensors in zip(owned.items(), stored["shards"], strict=True):
                shard.master.copy_(tensors[0])
                if tensors[1] is not None:
                    device = shard.master.device
                    exp_avg, exp_avg_sq = (t.to(device, copy=True) for t in tensors[1:3])
                    set_moments(optimizer, shard, exp_avg, exp_avg_sq, header["num_updates"])
                if average is not None:
                    average.parts[parameter].copy_(tensors[3])
            for entry in sharded_parameters(chunks):
                shard = owned.get(entry.data)
                start, part = (shard.start, shard.master) if shard else (0, None)
                entry.data.copy_(gather_full(entry.data, start, part, group))
        write_fp8_weights(optimizer, chunks)
        self.kept_step = step
        return header["state"]

    def forget_beyond(self, step: int) -> None:
        """Remove this rank's copies of steps after ``step``, from which the run continues.

        They would count as the newest, and new copies would be removed instead of them. Copies of ranks
        that now run on other nodes go too: nothing would ever remove them, and they may fill the memory.
        """
        if self._child is not None and self._step > step:
            self._child.kill("the run went back")
            self._child = None
        try:
            for copy in {*self._steps(), *self._steps("pt")}:
                if copy > step:
                    self._header(copy).unlink(missing_ok=True)
                    self._file(copy).unlink(missing_ok=True)
        except OSError as error:
            log.warning("node-local copies after step %d cannot be removed: %s", step, error)
        self.kept_step = min(self.kept_step, step)
        nodes = gather_messages(platform.node())
        here = {_folder_of(rank) for rank, node in enumerate(nodes) if node == platform.node()}
        if self._folder.name == min(here):  # one rank of each node
            for folder in self._root.glob("rank_*"):
                if folder.name not in here:
                    shutil.rmtree(folder, ignore_errors=True)

    def close(self, *, remove: bool) -> None:
        """End a copy under way; with ``remove``, delete this rank's copies.

        They are not needed once a shared checkpoint holds as much.
        """
        if self._child is not None:
            self._child.kill("the run ended")
            self._child = None
        if remove:
            shutil.rmtree(self._folder, ignore_errors=True)
            try:
                self._root.rmdir()
            except OSError:
                pass  # other ranks' copies are still there, or never were

    def _write(self, step: int, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._file(step)
        self._header(step).unlink(missing_ok=True)
        torch.save(tensors, file)
        header = {
            "fits": self._fits,
            "course": self._course,
            "state": state["state"],
            "num_updates": state["num_updates"],
            "bytes": file.stat().st_size,
            "xxh3_128": hash_file(file),
        }
        write_json(self._header(step), header)
        for old in self._steps()[:-_KEPT]:
            self._header(old).unlink(missing_ok=True)
            self._file(old).unlink(missing_ok=True)

    def _read(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return header and tensors; the tensors are mapped, not read."""
        file = self._file(step)
        try:
            header = json.loads(self._header(step).read_text())
            return header, torch.load(file, weights_only=True, mmap=True)
        except (OSError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from None

    def _course_of(self, step: int) -> str:
        """Return the course of a copy; an empty string, with a warning, if the copy cannot be used."""
        damage, course, file = "", "", self._file(step)
        try:
            header = json.loads(self._header(step).read_text())
            course = str(header["course"])
            if header["fits"] != self._fits:
                damage = "it belongs to another run, layout, model or data set"
            elif file.stat().st_size != header["bytes"]:
                damage = f"it has {file.stat().st_size} bytes instead of {header['bytes']}"
            elif hash_file(file) != header["xxh3_128"]:
                damage = "it has another hash than when it was written"
        except (OSError, ValueError, KeyError, TypeError) as error:
            damage = f"it cannot be read: {error}"
        if damage:
            log.warning("node-local copy %s is passed over: %s", file, damage)
        return "" if damage else course

    def _steps(self, kind: str = "json") -> list[int]:
        found = (_NAME.fullmatch(path.stem) for path in self._folder.glob(f"step_*.{kind}"))
        return sorted(int(name.group(1)) for name in found if name)

    def _file(self, step: int) -> Path:
        return self._folder / f"step_{step:010d}.pt"

    def _header(self, step: int) -> Path:
        return self._folder / f"step_{step:010d}.json"


def _folder_of(rank: int) -> str:
    return f"rank_{rank:05d}"


def _misfit(
    stored: Any, owned: Mapping[nn.Parameter, Any], average: MovingAverage | None, num_fp8: int
) -> str:
    """Return what of a copy's tensors has not the shape of what it is to fill, or an empty string."""
    try:
        copies, fp8 = list(stored["shards"]), list(stored["fp8"])
    except (KeyError, TypeError) as error:
        return f"it lacks {error}"
    if len(copies) != len(owned) or len(fp8) != num_fp8:
        return (
            f"it holds {len(copies)} parameters and {len(fp8)} FP8 states, the run {len(owned)} and "
            f"{num_fp8}"
        )
    for copy, shard in zip(copies, owned.values(), strict=True):
        found = [None if part is None else tuple(part.shape) for part in copy]
        shape = tuple(shard.master.shape)
        moments = [None if found[1:2] == [None] else shape] * len(MOMENTS)
        wanted = [shape, *moments, None if average is None else shape]
        if found != wanted:
            return f"shapes {found} instead of {wanted}"
    return ""


def _parts(shard: Any, average: MovingAverage | None, parameter: nn.Parameter) -> list[Any]:
    """Return a shard's master, both moments and average; None for those that do not exist."""
    return [
        shard.master,
        *(shard.state.get(kind) for kind in MOMENTS),
        average.parts[parameter] if average is not None else None,
    ]


def _held(part: Tensor | None) -> Tensor | None:
    """Return a tensor that the forked writer can save as it is: the fork keeps its values."""
    return None if part is None else own_memory(part)
