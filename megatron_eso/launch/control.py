"""Change a submitted job: cancel, requeue, watch."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from megatron_eso.errors import ClusterError
from megatron_eso.files import read_json
from megatron_eso.launch import slurm
from megatron_eso.launch.records import Records


def job_of(run: Path) -> str:
    """Return the job id that was submitted for a run.

    Raises:
        ClusterError: if none was.
    """
    job = read_json(run / "slurm" / "job.json").get("job")
    if not job:
        raise ClusterError(f"{run} was never submitted (no slurm/job.json); give a run folder")
    return str(job)


def cancel(run: Path, *, after_checkpoint: bool) -> str:
    """End the job of a run, at once or after the next checkpoint; return what was done.

    After a checkpoint: the file ``stop`` keeps the batch script from requeueing, and the signal that
    Slurm sends before the time limit makes the ranks save.
    """
    job = job_of(run)
    live = slurm.queue(job=job)
    if not live:
        return f"job {job} is not in the queue; nothing to cancel"
    if after_checkpoint and live[0].state == "RUNNING":
        (run / "slurm" / "stop").touch()
        slurm.command("scancel", "--batch", "--signal=USR1", job)
        return f"job {job} saves a checkpoint and ends"
    slurm.command("scancel", job)
    return f"job {job} cancelled"


def requeue(run: Path) -> str:
    """Release the held job of a run and forget its failures; return what was done.

    Raises:
        ClusterError: if it is neither held nor failed.
    """
    job = job_of(run)
    record = slurm.parse_record(slurm.command("scontrol", "show", "job", "-o", job))
    state = record.get("JobState", "")
    Records(run).set_state(without_progress=0)
    (run / "slurm" / "stop").unlink(missing_ok=True)
    if state == "PENDING" and record.get("Priority") == "0":
        slurm.command("scontrol", "release", job)
        return f"job {job} released"
    if state in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING"):
        raise ClusterError(f"job {job} is {state} and not held; there is nothing to requeue")
    if state.startswith("SPECIAL_EXIT"):
        slurm.command("scontrol", "release", job)
        return f"job {job} released"
    slurm.command("scontrol", "requeue", job)
    return f"job {job} requeued"


def watch(
    runs: list[Path] | None, *, every_seconds: float, once: bool, say: Callable[[str], None]
) -> None:
    """Start requeued jobs at once instead of after the credential wait, until no job is left.

    From inside the job this is not possible: Slurm overwrites the start time while it ends.
    """
    wanted = None if runs is None else {os.path.realpath(run) for run in runs}
    while True:
        jobs = [j for j in slurm.queue() if j.comment == "megatron-eso"]
        mine = [j for j in jobs if wanted is None or os.path.realpath(j.folder) in wanted]
        for job in mine:
            if job.state == "PENDING" and job.reason == "BeginTime":
                slurm.command("scontrol", "update", f"jobid={job.job}", "starttime=now")
                say(f"job {job.job}: started without waiting for the credential")
        if once or not mine:
            return
        time.sleep(every_seconds)
