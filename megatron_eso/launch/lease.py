"""Who may publish checkpoints of a run: a lease file that every attempt takes at its start.

Ranks on a node that was cut off from the network keep running while Slurm starts the same job elsewhere,
on the same file system. The writer calls :func:`require_lease` just before it publishes; an attempt
that lost the lease must not publish.

Owners are named ``JOBID.RESTART_COUNT`` where our job script runs the ranks, else ``HOST/PID/START``. In
a Slurm job with another script, ``JOBID.RESTART_COUNT@`` stands before that. Within one job, a newer
attempt takes the lease from an older one; a process does not take it from a living process of the same
attempt. Between two jobs, Slurm says whether the other one still runs. Where Slurm cannot be asked (in a
container), the job with the higher number is the newer one.
The file system must show a rename to all nodes (NFS, Lustre and Filestore do).
"""

import json
import logging
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path

from megatron_eso.errors import CheckpointError, ClusterError, LostLeaseError
from megatron_eso.files import write_json
from megatron_eso.launch import slurm
from megatron_eso.launch.environment import attempt_name, is_of_job_script

_RUNNING = ("RUNNING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT")
LEASE_FILE = "lease.json"
QUIET_SECONDS = 600.0
"""A lease of another host may be taken if it was not renewed for this long."""
_RENEW_SECONDS = 60.0
log = logging.getLogger(__name__)


def owner_name(environ: Mapping[str, str]) -> str:
    """Return the name under which this process holds a lease."""
    pid, attempt = os.getpid(), attempt_name(environ)
    if attempt and is_of_job_script(environ):
        return attempt
    return f"{attempt}@" * bool(attempt) + f"{platform.node()}/{pid}/{_start_of(pid)}"


def acquire(folder: Path, owner: str, *, now: float | None = None) -> None:
    """Take the lease of the checkpoints in ``folder``, also from an older attempt or a dead process.

    Raises:
        CheckpointError: if a newer attempt or a living process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    now = time.time() if now is None else now
    held = read(folder)
    if held and held["owner"] != owner:
        reason = _why_not(held, owner, folder, now)
        if reason:
            raise CheckpointError(
                f"{folder / LEASE_FILE}: {owner} may not write here, as {held['owner']} holds the lease "
                f"({reason}); wait for that run to end or stop it, or remove the file if that run is gone"
            )
    _write(folder, owner, now)
    require_lease(folder, owner, renew=False)


def require_lease(
    folder: Path, owner: str, *, renew: bool = True, now: float | None = None
) -> None:
    """Check that ``owner`` still holds the lease, and renew it; call this before publishing.

    Raises:
        LostLeaseError: if another attempt took the lease, or the file is missing or damaged.
    """
    held = read(folder)
    if not held:
        raise LostLeaseError(
            f"{folder / LEASE_FILE} is missing or damaged, so {owner} has no lease: it publishes nothing "
            "and must end; the same command continues the run"
        )
    if held["owner"] != owner:
        raise LostLeaseError(
            f"{folder / LEASE_FILE}: {owner} lost its lease to {held['owner']}: a newer attempt of this "
            "run is at work, so this one publishes nothing and must end"
        )
    if renew:
        _write(folder, owner, time.time() if now is None else now)


class Held:
    """The lease as its holder uses it for hours. It remembers that it was lost."""

    def __init__(self, folder: Path, owner: str) -> None:
        """Take note of a lease that was acquired.

        Args:
            folder: of the checkpoints.
            owner: its holder; empty: no lease is needed, and none is ever lost.
        """
        self.lost = ""
        """Why it is lost; empty while it is not."""
        self._folder, self._owner, self._renewed = folder, owner, time.monotonic()

    def require(self) -> None:
        """Do what :func:`require_lease` does."""
        if not self._owner:
            return
        self._renewed = time.monotonic()
        try:
            require_lease(self._folder, self._owner)
        except LostLeaseError as error:
            self.lost = str(error)
            raise

    def renew(self) -> None:
        """Renew it once a minute. If that cannot be done, warn: whoever publishes asks again."""
        if time.monotonic() - self._renewed < _RENEW_SECONDS:
            return
        try:
            self.require()
        except LostLeaseError:
            pass  # noted in `lost`
        except OSError as error:
            log.warning("the lease of %s could not be renewed: %s", self._folder, error)


def release(folder: Path, owner: str) -> None:
    """Release the lease if ``owner`` holds it."""
    held = read(folder)
    if held and held["owner"] == owner:
        (folder / LEASE_FILE).unlink(missing_ok=True)


def read(folder: Path) -> dict | None:
    """Return the lease: owner and time of renewal; None if there is none or it is damaged."""
    try:
        held = json.loads((folder / LEASE_FILE).read_text())
        return {"owner": str(held["owner"]), "updated": float(held["updated"])}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return None


def living_process(folder: Path) -> tuple[str, str] | None:
    """Return host and process id of the lease's owner; None if it is gone or is a job of our script.

    A process of another host counts as living while it renews the lease.
    """
    held = read(folder)
    process = _process(held["owner"]) if held else None
    if held is None or process is None or not _lives(process, held, time.time()):
        return None
    return process[0], process[1]


def _why_not(held: dict, owner: str, folder: Path, now: float) -> str:
    """Return why ``owner`` must not take the lease, or an empty string."""
    theirs, mine = _attempt(held["owner"]), _attempt(owner)
    if theirs and mine and theirs[0] != mine[0]:
        lives = _job_lives(held["owner"], folder)
        if lives is not None:
            return f"its job {theirs[0]} is running" if lives else ""
    if theirs and mine and theirs != mine:
        return f"attempt {held['owner']} is newer than {owner}" if theirs > mine else ""
    process = _process(held["owner"])
    return _lives(process, held, now) if process else _recently(held, now)


def _process(owner: str) -> tuple[str, str, str] | None:
    """Return the host, process id and start time in an owner's name; None if it names a job alone."""
    parts = owner.rpartition("@")[2].rsplit("/", 2)
    return (parts[0], parts[1], parts[2]) if len(parts) == 3 else None


def _lives(process: tuple[str, str, str], held: dict, now: float) -> str:
    """Return why the holder's process counts as living, or an empty string."""
    host, pid, start = process
    if host != platform.node():
        return _recently(held, now)
    return "its process runs on this host" if _start_of(int(pid)) == start else ""


def _job_lives(holder: str, folder: Path) -> bool | None:
    """Return whether the holder's job runs; None if Slurm cannot be asked.

    A job of our script is identified by its folder: another cluster may have a job of the same number.
    """
    attempt, at, _ = holder.partition("@")
    try:
        jobs = slurm.queue(job=attempt.partition(".")[0])
    except ClusterError:
        return None
    jobs = [job for job in jobs if job.state in _RUNNING]
    if not at:
        mine = Path(os.path.realpath(folder))
        return any(job.run is not None and mine.is_relative_to(job.run) for job in jobs)
    return bool(jobs)


def _recently(held: dict, now: float) -> str:
    age = now - held["updated"]
    if age < -QUIET_SECONDS:
        return (
            f"renewed {-age:.0f} s in the future: the clocks differ, so whether it lives is unknown; "
            "correct the clocks"
        )
    return f"renewed {age:.0f} s ago" if age < QUIET_SECONDS else ""


def _attempt(owner: str) -> tuple[int, int] | None:
    job, dot, restart = owner.partition("@")[0].partition(".")
    return (int(job), int(restart)) if dot and job.isdigit() and restart.isdigit() else None


def _start_of(pid: int) -> str:
    """Return the kernel's start time of a process, which reveals a reused pid; '' if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _write(folder: Path, owner: str, now: float) -> None:
    write_json(folder / LEASE_FILE, {"owner": owner, "updated": now}, durable=False)
