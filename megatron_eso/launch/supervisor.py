"""Supervise the ranks of a run on this machine: notice deaths and hangs, restart, give up in time.

A fault of one rank ends all ranks, since the others wait for it in a collective; they start again
from the newest valid checkpoint. User errors are not retried. Too many restarts in a row without a newer
checkpoint end the run with an exit code of their own: such a fault will not go away by itself.
"""

import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from megatron_eso.errors import (
    CRASH_LOOP_EXIT_CODE,
    HANG_EXIT_CODE,
    STOPPED_EXIT_CODE,
    CheckpointError,
)
from megatron_eso.launch import events, lease
from megatron_eso.launch.environment import (
    attempt_name,
    is_of_job_script,
    local_environment,
    node_name,
)
from megatron_eso.launch.heartbeat import Beat, Board
from megatron_eso.launch.processes import (
    STOPPING,
    adopt_orphans,
    free_port,
    ignore_signals,
    kill_session,
    reap,
    send,
    state_of,
)
from megatron_eso.launch.records import checkpoint_step
from megatron_eso.launch.said import Said
from megatron_eso.launch.starter import Starter, threads_of_each

_FINAL_CODES = (2, 3, 4, 5, 6)  # errors.py: the same command would fail the same way
_STOP_GRACE_SECONDS, _ERROR_GRACE_SECONDS = 120.0, 10.0
_POLL_SECONDS, _LONGEST_COUNTED_POLL = 0.05, 1.0


@dataclass(frozen=True)
class Supervision:
    """What is supervised and when to give up."""

    arguments: list[str]
    """What a rank runs: ``python -m megatron_eso ARGUMENTS``."""
    num_ranks: int
    run: Path
    """Run folder, for the ledger."""
    setup_timeout_seconds: float = 600.0
    """From a rank's start to its first heartbeat."""
    max_restarts: int = 3
    """Restarts in a row without a newer checkpoint; 0: never restart."""
    is_warm: bool = False
    """Fork ranks from a template; see launch/template.py."""
    rank_environment: Mapping[str, str] | None = None
    """RANK, WORLD_SIZE ... that srun gave the single rank of this task; None: we choose them."""
    module: str = "megatron_eso"
    """Module that a rank runs, with training's imports and arguments."""
    arguments_to_go_on: tuple[str, ...] = ()
    """Further arguments once the run has its own checkpoint."""


@dataclass(frozen=True)
class Ending:
    """How one start of the ranks ended."""

    code: int
    """Exit code for the user if the ranks are not started again."""
    is_fault: bool
    why: str = ""
    cause: str = ""
    """killed, crash or hang."""
    rank: int = -1
    step: int = 0
    kept_step: int = -1
    silent_seconds: float = 0.0
    """Time since the last sign of progress."""


@dataclass
class _Rank:
    """A rank as the launcher sees it."""

    pid: int
    number: int
    """Its RANK."""
    code: int | None = None
    beat: Beat | None = None
    silent_seconds: float = 0.0


@dataclass
class _Stop:
    """Signal handler of the launcher; keeps the first signal's name."""

    name: str = ""
    pids: list[int] = field(default_factory=list)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Pass the signal on to every rank; the ranks agree on a step, save and stop."""
        self.name = self.name or signal.Signals(number).name
        for pid in self.pids:
            send(pid, number)


def supervise(settings: Supervision) -> int:
    """Run the ranks to their end, restarting them after faults; return the exit code.

    The process should then end: it ignores signals that stop a run from that point on.
    """
    refusal = _refusal(settings)
    if refusal:
        say(refusal)
        return CheckpointError.exit_code
    adopt_orphans()
    boards, said = [Board() for _ in range(settings.num_ranks)], Said()
    shared = [said.file, *(board.file for board in boards)]
    stop = _Stop()
    for number in STOPPING:
        signal.signal(number, stop)
    base = {**os.environ, **threads_of_each(settings.num_ranks), **said.file.environment}
    starter = Starter(settings.arguments, [file.descriptor for file in shared], base,
                      is_warm=settings.is_warm, module=settings.module)  # fmt: skip
    _note(settings, "launch", num_ranks=settings.num_ranks)
    code = 1
    try:
        code = _restart_until_done(settings, starter, boards, said, stop, base)
    finally:
        starter.close()
        reap(wait_seconds=5.0)
        for file in shared:
            file.close()
        ignore_signals()
        _note(settings, "launch_end", code=code)
    return code


def _refusal(settings: Supervision) -> str:
    """Return why the ranks would be refused the run's lease, or an empty string.

    Called before the first event, which would cut the account of the run that holds the lease.
    """
    if settings.rank_environment or is_of_job_script(os.environ):
        return ""  # the job script has taken it
    checkpoints, owner = settings.run / "checkpoints", lease.owner_name(os.environ)
    try:
        lease.acquire(checkpoints, owner)
        lease.release(checkpoints, owner)  # rank 0 takes it again
    except CheckpointError as error:
        return str(error)
    except OSError:
        return ""  # the ranks report what is wrong with the folder
    return ""


def _note(settings: Supervision, event: str, **facts: object) -> None:
    """Write to the ledger; of many launchers under srun, only that of rank 0 writes."""
    given = settings.rank_environment
    if given is None or given["RANK"] == "0":
        events.record(settings.run, event, **facts)


def _place_in_job(settings: Supervision) -> dict[str, str]:
    """Return the attempt, the start within it and the node of an srun task; see attempt.suspects."""
    if settings.rank_environment is None:
        return {}
    return {
        "attempt": attempt_name(os.environ),
        "start": settings.rank_environment["MASTER_PORT"],
        "node": node_name(os.environ),
    }


def _restart_until_done(
    settings: Supervision,
    starter: Starter,
    boards: list[Board],
    said: Said,
    stop: _Stop,
    base: dict[str, str],
) -> int:
    kept, without_progress = -1, 0
    while True:
        said.clear()
        ending = _run_once(settings, starter, boards, stop, base)
        if not ending.is_fault:
            return ending.code
        without_progress = 0 if ending.kept_step > kept else without_progress + 1
        kept = max(kept, ending.kept_step)
        # Ranks that failed early have not reported any checkpoint.
        newest = max(kept, checkpoint_step(settings.run))
        events.record(
            settings.run, "fault", cause=ending.cause, why=ending.why, rank=ending.rank,
            step=ending.step, silent_seconds=round(ending.silent_seconds, 3), **_place_in_job(settings),
        )  # fmt: skip
        if stop.name:
            say(f"{ending.why}; not started again, as {stop.name} asked for a stop")
            return ending.code
        if settings.max_restarts == 0:
            say(ending.why)
            return ending.code
        if without_progress >= settings.max_restarts:
            newer = f"newer checkpoint than step {newest}" if newest >= 0 else "checkpoint"
            say(
                f"{ending.why}; given up after {without_progress} faults in a row without a {newer} "
                f"(resilience.max_restarts_without_progress={settings.max_restarts}). The messages above "
                "name the cause; the same command continues the run"
            )
            return CRASH_LOOP_EXIT_CODE
        if kept >= 0:
            starter.arguments = [*settings.arguments, *settings.arguments_to_go_on]
        place = f" (newest checkpoint: step {newest})" if newest >= 0 else ""
        say(f"{ending.why}; starting again{place}")


def _run_once(
    settings: Supervision,
    starter: Starter,
    boards: list[Board],
    stop: _Stop,
    base: dict[str, str],
) -> Ending:
    """Start all ranks and wait until they end or one fails; kill those left before returning."""
    port, ranks = free_port(), []
    _note(settings, "start", num_ranks=settings.num_ranks)
    for local, board in enumerate(boards):
        board.clear()
        own = settings.rank_environment or local_environment(local, settings.num_ranks, port)
        pid = starter.start({**base, **own, **board.file.environment})
        ranks.append(_Rank(pid, int(own["RANK"])))
        stop.pids.append(ranks[-1].pid)
    if stop.name:  # the signal came before there were ranks to pass it on to
        for rank in ranks:
            send(rank.pid, signal.Signals[stop.name])
    try:
        return _watch(settings, boards, ranks)
    finally:
        stop.pids.clear()
        for rank in ranks:
            kill_session(rank.pid)
        left = {rank.pid for rank in ranks if rank.code is None}
        deadline = time.monotonic() + 10.0
        while left and time.monotonic() < deadline:
            left -= reap().keys()
            time.sleep(0.01)


def _watch(settings: Supervision, boards: list[Board], ranks: list[_Rank]) -> Ending:
    last, grace_ends = time.monotonic(), None
    while True:
        time.sleep(_POLL_SECONDS)
        now = time.monotonic()
        # A machine that was suspended, or a launcher that was stopped, says nothing about the ranks.
        passed, last = min(now - last, _LONGEST_COUNTED_POLL), now
        ended = reap()
        for rank, board in zip(ranks, boards, strict=True):
            rank.code = ended.get(rank.pid, rank.code)
            beat = board.read()
            is_silent = beat is None or beat == rank.beat
            rank.silent_seconds = rank.silent_seconds + passed if is_silent else 0.0
            rank.beat = beat or rank.beat
        codes = [rank.code for rank in ranks]
        if all(code == 0 for code in codes):
            return Ending(0, is_fault=False)
        failed = [code for code in codes if code not in (None, 0)]
        is_agreed = bool(failed) and all(c in (STOPPED_EXIT_CODE, *_FINAL_CODES) for c in failed)
        if failed and not is_agreed:
            return _death(ranks)
        if is_agreed and grace_ends is None:
            is_stop = STOPPED_EXIT_CODE in failed
            grace_ends = now + (_STOP_GRACE_SECONDS if is_stop else _ERROR_GRACE_SECONDS)
        if is_agreed and (None not in codes or now > (grace_ends or now)):
            return Ending(max(code for code in failed if code), is_fault=False)
        if not failed:
            hung = _hung(settings, ranks)
            if hung is not None:
                return hung


def _death(ranks: list[_Rank]) -> Ending:
    """Describe the first failure: a signal before an exit code, which may be only its consequence."""
    rank = min((r for r in ranks if r.code not in (None, 0)), key=lambda r: (r.code or 0) >= 0)
    code = rank.code or 0
    if code < 0:
        how, cause = f"was killed by {signal.Signals(-code).name}", "killed"
        if code == -signal.SIGKILL:
            how += " (perhaps out of memory: `dmesg` shows it)"
    else:
        how, cause = f"ended with exit code {code}", "crash"
    return _fault(ranks, rank, cause, how, code if code > 0 else 128 - code)


def _hung(settings: Supervision, ranks: list[_Rank]) -> Ending | None:
    """Return the fault if a rank has been silent for longer than its section allows."""
    for rank in ranks:
        limit = rank.beat.limit_seconds if rank.beat else settings.setup_timeout_seconds
        if rank.code is not None or rank.silent_seconds <= limit:
            continue
        # All ranks wait for one: a stopped process if there is one, else the rank farthest behind.
        stopped = [r for r in ranks if state_of(r.pid) in ("T", "t")]
        hangs = (stopped or [min(ranks, key=_place)])[0]
        waits = f"rank {rank.number} waits in section {_section(rank)!r}, " if hangs != rank else ""
        how = (
            f"shows no progress in section {_section(hangs)!r} after {hangs.silent_seconds:.0f} s "
            f"({waits}limit {limit:.0f} s)" + (", it is stopped (SIGSTOP)" if stopped else "")
        )
        _show_stacks(ranks)
        return _fault(ranks, hangs, "hang", how, HANG_EXIT_CODE)
    return None


def _section(rank: _Rank) -> str:
    return rank.beat.section if rank.beat else "start"


def _place(rank: _Rank) -> tuple[int, int]:
    return (rank.beat.step, rank.beat.number) if rank.beat else (-1, -1)


def _fault(ranks: list[_Rank], rank: _Rank, cause: str, how: str, code: int) -> Ending:
    beats = [rank.beat for rank in ranks if rank.beat]
    step = max((beat.step for beat in beats), default=0)
    is_setup = all(beat.section == "setup" for beat in beats)
    where = " during start-up" if is_setup else f" after step {step}"
    return Ending(
        code=code,
        is_fault=True,
        why=f"rank {rank.number} {how}{where}",
        cause=cause,
        rank=rank.number,
        step=step,
        kept_step=max((beat.kept_step for beat in beats), default=-1),
        silent_seconds=min((rank.silent_seconds for rank in ranks), default=0.0),
    )


def _show_stacks(ranks: list[_Rank]) -> None:
    """Make every rank print its stack (faulthandler answers even while Python's lock is held)."""
    for rank in ranks:
        if rank.beat:
            send(rank.pid, signal.SIGUSR2)
    time.sleep(0.3)


def say(text: str) -> None:
    """Print a line from the launcher, on standard error."""
    print(f"[launch {time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)
