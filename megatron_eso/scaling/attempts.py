"""How often a cell was started, which starts failed, and whether one of them still runs.

A cell's folder holds for this:

attempts   a line for every start, and another one after it if that start failed by itself
pid        process, host and Slurm attempt of the trainer; removed when a runner sees the trainer end
lock       held by the runner that starts the cell

Only failures count against ``--max-attempts``. A start that was interrupted (Ctrl-C, a kill, a requeue, a
runner that died) says nothing about the cell and leaves no second line.
"""

import fcntl
import os
import platform
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from megatron_eso.errors import STOPPED_EXIT_CODE
from megatron_eso.files import read_json, write_whole
from megatron_eso.launch.environment import attempt_name
from megatron_eso.launch.lease import LEASE_FILE, QUIET_SECONDS
from megatron_eso.launch.processes import STOPPING

LOG_MARK = "--- started"
"""Start of the line in log.txt that stands before the output of each start."""
_FAILED = "failed"
_MOST_LINES, _MOST_CHARACTERS = 8, 400  # of what is quoted from a log, and of a line of it
_FROM_OUTSIDE = (*STOPPING, signal.SIGHUP)


@contextmanager
def claim(folder: Path) -> Iterator[bool]:
    """Let one runner at a time look at a cell and start it; yield whether this runner may."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def note_start(folder: Path) -> None:
    """Record that a cell is about to be started."""
    with open(folder / "attempts", "a") as file:
        file.write(time.strftime("%Y-%m-%dT%H:%M:%S\n"))


def note_process(folder: Path, pid: int, environ: Mapping[str, str] = os.environ) -> None:
    """Record which process trains a cell, and on which host and in which Slurm attempt."""
    write_whole(folder / "pid", f"{pid}\n{platform.node()}\n{attempt_name(environ)}\n")


def note_end(folder: Path, code: int) -> None:
    """Record that the trainer ended, and whether that was a failure of its own.

    Args:
        folder: the cell's folder.
        code: exit code of the trainer, or -signal.
    """
    forget_process(folder)
    status = _status_since_start(folder)
    if status.get("state") in ("finished", "stopped") or code == STOPPED_EXIT_CODE:
        return
    # A launcher of several ranks reports a signal as 128 + its number.
    if code in {number for n in _FROM_OUTSIDE for number in (-n, 128 + n)}:
        return
    with open(folder / "attempts", "a") as file:
        file.write(f"{_FAILED} {time.strftime('%Y-%m-%dT%H:%M:%S')} exit {code}\n")


def forget_process(folder: Path) -> None:
    """Record that no trainer works on a cell any more."""
    (folder / "pid").unlink(missing_ok=True)


def count_attempts(folder: Path) -> tuple[int, int, bool]:
    """Return the number of starts, how many of them failed by themselves, and whether the last one did."""
    lines = lines_of(folder / "attempts")
    failed = [line.startswith(_FAILED) for line in lines]
    return len(lines) - sum(failed), sum(failed), bool(failed) and failed[-1]


def last_words(log: Path) -> list[str]:
    """Return the last error message of the newest start in a log, else its last line; [] without any."""
    try:
        said = log.read_text(errors="replace").splitlines()
    except OSError:
        return []
    marks = [number for number, line in enumerate(said) if line.startswith(LOG_MARK)]
    said = [line for line in said[marks[-1] + 1 if marks else 0 :] if line.strip()]
    errors = [number for number, line in enumerate(said) if line.startswith("error: ")]
    found = said[errors[-1] :] if errors else said[-1:]
    return [line[:_MOST_CHARACTERS] for line in found[:_MOST_LINES]]


def is_alive(folder: Path, environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether a cell's trainer still runs, here (also after its runner died) or elsewhere.

    A process on another host cannot be looked at. It counts as alive until its status says otherwise, its
    run's files have not changed for ``QUIET_SECONDS``, or Slurm has started the same job again here.
    """
    lines = lines_of(folder / "pid")
    if not lines:
        return False
    pid, host, attempt = [*lines, "", ""][:3]
    if host in ("", platform.node()):
        try:
            command = (Path("/proc") / pid / "cmdline").read_bytes()
        except OSError:
            return False
        return str(folder / "cell.yaml").encode() in command
    if attempt and attempt.split(".")[0] == environ.get("SLURM_JOB_ID"):
        return False
    if _status_since_start(folder).get("state", "running") != "running":
        return False
    run = folder / "run"
    signs = (folder / "pid", run / "status.json", run / "checkpoints" / LEASE_FILE)
    return time.time() - max(map(_changed, signs)) < QUIET_SECONDS


def _status_since_start(folder: Path) -> dict:
    """Return the status that the newest start wrote; empty before it wrote one."""
    path = folder / "run" / "status.json"
    return read_json(path) if _changed(path) >= _changed(folder / "attempts") else {}


def _changed(path: Path) -> float:
    """Return when a file was last written; 0 if there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def lines_of(path: Path) -> list[str]:
    """Return the lines of a text file; none if there is no such file."""
    return path.read_text().splitlines() if path.is_file() else []
