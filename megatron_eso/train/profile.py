"""Profiles chosen steps on chosen ranks: a trace to look at, and a table of where the time went.

RUN/profile/step_0000010_rank_00000.json   Chrome trace, for https://ui.perfetto.dev or chrome://tracing
                                  .txt     the table
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity

from megatron_eso.config.schema import TrainConfig
from megatron_eso.files import write_whole
from megatron_eso.parallel.phases import PREFIX, waiting_for_device

log = logging.getLogger(__name__)
Interval = tuple[float, float]
_ON_CPU, _ON_GPU = "gloo:", ("nccl:", "ncclDevKernel", "ncclKernel")
_OTHER = "other"
_TAIL_BYTES = 64


@dataclass(frozen=True)
class PhaseTime:
    """Where a part of a step's wall-clock time went, in seconds."""

    name: str
    seconds: float
    """Time in this phase, without the phases inside it."""
    communication: float
    """The part of ``seconds`` spent on exchanges between ranks not hidden by computation on the device."""


class Profile:
    """Profiles the steps in ``train.profile_steps`` on the ranks in ``train.profile_ranks``.

    All ranks must call it.
    """

    def __init__(
        self,
        settings: TrainConfig,
        folder: Path,
        rank: int,
        left_out: Callable[[float], None] = lambda begin: None,
    ) -> None:
        """Prepare to profile.

        Args:
            settings: which steps, on which ranks.
            folder: run folder.
            rank: this rank.
            left_out: called with the time at which the writing of profiles began, once all ranks are
                done: that time is not part of the step.
        """
        self._steps, self._is_asked = (
            frozenset(settings.profile_steps),
            rank in settings.profile_ranks,
        )
        self._folder, self._rank, self._left_out = folder / "profile", rank, left_out

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Profile what runs inside, if step ``number`` (as in the log) is one to profile."""
        if number not in self._steps:
            yield
            return
        if self._is_asked:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            with torch.profiler.profile(activities=activities) as profiler, waiting_for_device():
                with torch.profiler.record_function(PREFIX + _OTHER):
                    yield
        else:
            profiler = None
            yield
        begin = time.perf_counter()
        if profiler is not None:
            self._write(number, profiler)
        dist.barrier()  # else the other ranks wait in the next step, and its time includes the wait
        self._left_out(begin)

    def _write(self, number: int, profiler: torch.profiler.profile) -> None:
        begin = time.perf_counter()
        name = f"step_{number:07d}_rank_{self._rank:05d}"
        text = "\n".join(table(phase_times(profiler.events() or [])))
        where = f"in {self._folder}"
        try:
            self._folder.mkdir(exist_ok=True)
            write_trace(profiler, self._folder / f"{name}.json")
            write_whole(self._folder / f"{name}.txt", text + "\n")
        except OSError as error:
            where = "not written"
            log.warning("the profile of step %d cannot be written: %s", number, error)
        if self._rank == 0:
            log.info(
                "profile of step %d (%.1f s to write) %s:\n%s",
                number, time.perf_counter() - begin, where, text,
            )  # fmt: skip


def write_trace(profiler: torch.profiler.profile, path: Path) -> None:
    """Write a Chrome trace.

    Raises:
        OSError: if the file is missing or truncated afterwards, which torch's profiler does not report.
            A partial file is removed.
    """
    path.unlink(missing_ok=True)
    try:
        profiler.export_chrome_trace(str(path))
        if not _is_whole(path):
            raise OSError(f"{path} was not written to its end; is the disk full?")
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        path.with_name(f"{path.name}.tmp").unlink(missing_ok=True)


def _is_whole(path: Path) -> bool:
    """Return whether a file ends as a JSON object does. Traces are too large to read whole."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with open(path, "rb") as file:
        file.seek(-min(path.stat().st_size, _TAIL_BYTES), os.SEEK_END)
        return file.read().rstrip().endswith(b"}")


def phase_times(events: Iterable[Any]) -> list[PhaseTime]:
    """Return the phases of a profiled step in the order in which they began.

    Args:
        events: torch's profiler events, with ``name``, ``time_range`` in microseconds, ``device_type``.
    """
    phases: list[tuple[str, Interval]] = []
    exchanges: list[Interval] = []
    kernels: list[Interval] = []
    for event in events:
        when = (event.time_range.start, event.time_range.end)
        on_gpu = event.device_type is DeviceType.CUDA
        if event.name.startswith(PREFIX):
            if not on_gpu:
                phases.append((event.name.removeprefix(PREFIX), when))
        elif event.name.startswith(_ON_GPU if on_gpu else _ON_CPU):
            exchanges.append(when)
        elif on_gpu:
            kernels.append(when)
    visible = _without(_union(exchanges), _union(kernels))
    phases.sort(key=lambda phase: (phase[1][0], -phase[1][1]))
    found: dict[str, list[float]] = {}
    for index, (name, (begin, end)) in enumerate(phases):
        inner = _union(i for _, i in phases[index + 1 :] if i[0] >= begin and i[1] <= end)
        own = _without([(begin, end)], inner)
        sums = found.setdefault(name, [0.0, 0.0])
        sums[0] += _length(own)
        sums[1] += _length(own) - _length(_without(own, visible))
    return [PhaseTime(name, s / 1e6, c / 1e6) for name, (s, c) in found.items()]


def table(phases: list[PhaseTime]) -> list[str]:
    """Return the table's lines; shares are of the step's time."""
    total = sum(phase.seconds for phase in phases) or 1.0
    rows = [*(p for p in phases if p.name != _OTHER), *(p for p in phases if p.name == _OTHER)]
    rows.append(PhaseTime("step", total, sum(phase.communication for phase in phases)))
    lines = [f"{'phase':<16}{'seconds':>10}{'share':>8}  {'of it communication':>20}"]
    for row in rows:
        share = row.communication / row.seconds if row.seconds else 0.0
        lines.append(
            f"{row.name:<16}{row.seconds:>10.4f}{row.seconds / total:>8.1%}  "
            f"{row.communication:>12.4f} {share:>7.1%}"
        )
    return lines


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return sorted, disjoint intervals that cover the same time."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def _without(intervals: list[Interval], taken: list[Interval]) -> list[Interval]:
    """Return the parts of ``intervals`` outside ``taken``; both must be sorted and disjoint."""
    left = []
    for begin, end in intervals:
        for first, last in taken:
            if last <= begin or first >= end:
                continue
            if first > begin:
                left.append((begin, first))
            begin = max(begin, last)
        if begin < end:
            left.append((begin, end))
    return left


def _length(intervals: list[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)
