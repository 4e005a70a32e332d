"""Where a run's time went, computed from the events in RUN/events.jsonl (launch/events.py).

Time is cut into stretches, each with one cause. Training time counts as effective only if its steps
were kept; time that a fault undid counts as ``lost steps``. Between two events of one boot, the
machine's monotonic clock decides how much time passed. The wall clock is used only across machines and
reboots; its jumps are reported, not counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_eso.errors import UserError
from megatron_eso.launch.events import EVENTS, read_events

TRAINING, LOST = "training", "lost steps"
CAUSES = (TRAINING, LOST, "set-up", "checkpoint stall", "evaluation", "fault detection", "restart",
          "not running")  # fmt: skip
_STALLS = {"checkpoint": "checkpoint stall", "local_copy": "checkpoint stall",
           "evaluation": "evaluation"}  # fmt: skip
_JUMP_SECONDS = 5.0


@dataclass(frozen=True)
class Stretch:
    """Time with one cause, in seconds since the ledger's first event."""

    begin: float
    end: float
    cause: str

    @property
    def seconds(self) -> float:
        """Length of the stretch."""
        return self.end - self.begin


@dataclass(frozen=True)
class Ledger:
    """The account of a run."""

    stretches: list[Stretch]
    faults: list[dict[str, Any]]
    num_starts: int
    lost_steps: int
    last_step: int
    clock_jumps: list[float]
    """Seconds by which the wall clock departed from the machine's monotonic clock."""

    @property
    def elapsed(self) -> float:
        """Seconds from the first to the last event."""
        return self.stretches[-1].end if self.stretches else 0.0

    def seconds(self, cause: str) -> float:
        """Return the seconds spent on one cause."""
        return sum(s.seconds for s in self.stretches if s.cause == cause)

    @property
    def effective_share(self) -> float:
        """Share of the elapsed time that went into steps that were kept."""
        return self.seconds(TRAINING) / self.elapsed if self.elapsed else 0.0

    @property
    def mean_seconds_between_failures(self) -> float | None:
        """Seconds that the run was up per fault; None without a fault."""
        up = self.elapsed - self.seconds("not running")
        return up / len(self.faults) if self.faults else None

    def lines(self) -> list[str]:
        """Return the report."""
        between = self.mean_seconds_between_failures
        lines = [
            f"effective training time  {self.effective_share:.1%} of {clock(self.elapsed)}",
            f"starts {self.num_starts}, faults {len(self.faults)}, last step {self.last_step}, "
            f"lost steps {self.lost_steps}",
            f"mean time between failures  {clock(between) if between else 'no failure yet'}",
            "",
        ]
        for cause in CAUSES:
            seconds = self.seconds(cause)
            lines.append(
                f"{cause:<18}{clock(seconds):>14}{seconds / max(self.elapsed, 1e-9):>8.1%}"
            )
        if self.faults:
            lines += ["", *(f"fault at step {f.get('step', '?')}: {f['why']}" for f in self.faults)]
        for jump in self.clock_jumps:
            lines.append(f"the wall clock jumped by {jump:+.0f} s; the times above do not count it")
        return lines


def read_ledger(run: Path) -> Ledger:
    """Return the account of a run folder.

    Raises:
        UserError: if it has no events.
    """
    events = read_events(run)
    if not events:
        raise UserError(f"{run} has no {EVENTS}: give the folder of a run that was started")
    return account(events)


def account(events: list[dict[str, Any]]) -> Ledger:
    """Return the account of events that are in the order they were written."""
    events = _with_work(events)
    times, jumps = _axis(events)
    stretches: list[Stretch] = []
    lost_steps, faults = 0, []
    attempts = list(_attempts(events))
    for number, (first, last) in enumerate(attempts):
        nearest = attempts[number + 1][0] if number + 1 < len(attempts) else last
        resumed = _resumed_step(events[nearest:]) if nearest > last else None
        pieces, lost = _attempt(events[first : last + 1], times[first : last + 1], resumed)
        stretches += pieces
        lost_steps += lost
        # Launchers on several nodes may each report the same fault: count it once.
        faults += [e for e in events[first : last + 1] if e["event"] == "fault"][:1]
        if nearest > last and times[nearest] > times[last]:
            gap_is_restart = (
                events[last]["event"] == "fault" and events[nearest]["event"] == "start"
            )
            cause = "restart" if gap_is_restart else "not running"
            stretches.append(Stretch(times[last], times[nearest], cause))
    steps = [int(e["step"]) for e in events if "step" in e]
    return Ledger(
        stretches=[s for s in stretches if s.seconds > 0],
        faults=faults,
        num_starts=sum(e["event"] == "setup" for e in events),
        lost_steps=lost_steps,
        last_step=max(steps, default=0),
        clock_jumps=jumps,
    )


def _with_work(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the events without launches of a run that had finished: its ranks note nothing."""
    kept: list[dict[str, Any]] = []
    for event in events:
        kept.append(event)
        kinds = [one["event"] for one in kept[-3:]]
        if kinds == ["launch", "start", "launch_end"] and event.get("code") == 0:
            del kept[-3:]
    return kept


def _axis(events: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Return every event's time since the first, never running backwards, and the clock jumps."""
    times, jumps = [0.0], []
    for before, event in pairwise(events):
        wall = event["time"] - before["time"]
        passed = wall
        if event.get("boot") and event.get("boot") == before.get("boot"):
            passed = event["clock"] - before["clock"]
            if abs(wall - passed) > _JUMP_SECONDS:
                jumps.append(wall - passed)
        elif wall < -_JUMP_SECONDS:  # the clocks of two machines differ by less
            jumps.append(wall)
        times.append(times[-1] + max(passed, 0.0))
    return times, jumps


def _attempts(events: list[dict[str, Any]]) -> Iterator[tuple[int, int]]:
    """Yield the indices (first, last) of the events of every start of the ranks."""
    first = 0
    for index in range(1, len(events)):
        kind, before = events[index]["event"], events[index - 1]["event"]
        is_new = kind in ("launch", "start") or (kind == "setup" and before not in ("start",))
        if is_new and before != "launch":
            yield first, index - 1
            first = index
    yield first, len(events) - 1


def _resumed_step(events: list[dict[str, Any]]) -> int | None:
    """Return the step from which the next start that became ready continued; None if none did."""
    return next((int(e["step"]) for e in events if e["event"] == "ready"), None)


def _attempt(
    events: list[dict[str, Any]], times: list[float], resumed: int | None
) -> tuple[list[Stretch], int]:
    """Return the stretches of one start of the ranks, and the number of steps it lost."""
    ready = next((i for i, e in enumerate(events) if e["event"] == "ready"), None)
    if ready is None:
        return [Stretch(times[0], times[-1], "set-up")], 0
    pieces = [Stretch(times[0], times[ready], "set-up")]
    end = times[-1]
    fault = next((i for i, e in enumerate(events) if e["event"] == "fault"), None)
    silent = float(events[fault].get("silent_seconds", 0.0)) if fault is not None else 0.0
    stop = max((times[fault] if fault is not None else end) - silent, times[ready])
    position = times[ready]
    for event, time in zip(events[ready:], times[ready:], strict=True):
        cause = _STALLS.get(event["event"])
        if cause is None or time > stop:
            continue
        begin = max(time - float(event["seconds"]), position)
        pieces += [Stretch(position, begin, TRAINING), Stretch(begin, time, cause)]
        position = time
    pieces.append(Stretch(position, stop, TRAINING))
    lost = _lost_steps(events, resumed)
    done = max(int(e["step"]) for e in events if "step" in e) - int(events[ready]["step"])
    pieces = _mark_lost(pieces, lost / done if done else 0.0)
    if fault is not None:
        pieces += [Stretch(stop, times[fault], "fault detection")]
    pieces.append(Stretch(times[fault] if fault is not None else stop, end, "not running"))
    return pieces, lost


def _lost_steps(events: list[dict[str, Any]], resumed: int | None) -> int:
    """Return how many steps of this start the next one repeats."""
    reached = max((int(e["step"]) for e in events if "step" in e), default=0)
    return max(reached - resumed, 0) if resumed is not None else 0


def _mark_lost(pieces: list[Stretch], share: float) -> list[Stretch]:
    """Return the pieces with the last ``share`` of the training time marked lost, at most all of it."""
    left = share * sum(p.seconds for p in pieces if p.cause == TRAINING)
    marked: list[Stretch] = []
    for piece in reversed(pieces):
        if piece.cause != TRAINING or left <= 0:
            marked.append(piece)
            continue
        cut = max(piece.end - left, piece.begin)
        left -= piece.end - cut
        marked += [Stretch(cut, piece.end, LOST), Stretch(piece.begin, cut, TRAINING)]
    return marked[::-1]


def clock(seconds: float) -> str:
    """Return a duration in readable form."""
    if seconds < 600:
        return f"{seconds:.1f} s"
    hours, rest = divmod(int(seconds), 3600)
    days, hours = divmod(hours, 24)
    return f"{days} d " * bool(days) + f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
