"""Change a submitted job: cancel, requeue, watch."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from megatron_eso.errors import ClusterError
from megatron_eso.launch import lease, slurm
from megatron_eso.launch.records import Records, tasks_of


def require_folders(runs: list[Path]) -> None:
    """Refuse run folders that do not exist."""
    missing = [str(run) for run in runs if not run.is_dir()]
    if missing:
        raise ClusterError(f"no such run folder: {', '.join(missing)}")


def job_of(run: Path) -> str:
    """Return the id of the job that was submitted for a run.

    Raises:
        ClusterError: if no job was submitted, with where the run is trained instead.
    """
    job = Records(run).submission().get("job")
    if not job:
        raise ClusterError(f"{run} {_why_no_job(run)}")
    return str(job)


def _why_no_job(run: Path) -> str:
    """Return what a folder without a job is, by what it records."""
    if not run.is_dir():
        return "is not a folder; give a run folder, such as runs/NAME"
    status, process = Records(run).status(), lease.living_process(run / "checkpoints")
    if process:
        host, pid = process
        return (
            f"was not submitted to Slurm, so it has no job. It runs on {host} as process {pid}: "
            f"`kill {pid}` there makes it save a checkpoint and end"
        )
    if not status:
        return "holds no run: it has neither a Slurm job (slurm/job.json) nor a status.json"
    return (
        "was not submitted to Slurm, so it has no job, and no process is known to run it "
        f"(status.json: {status.get('state')}, step {status.get('step')})"
    )


def cancel(run: Path, *, after_checkpoint: bool) -> str:
    """End a run's job, immediately or after a checkpoint; return what was done.

    After a checkpoint: the file ``stop`` keeps the batch script from requeueing, and the signal that
    Slurm also sends before the time limit makes the ranks save.
    """
    job = job_of(run)
    live = slurm.queue(job=job)
    if not live:
        return f"job {job} is not in the queue; nothing to cancel"
    running = [one.job for one in live if one.state == "RUNNING"]
    if not after_checkpoint or not running:
        slurm.command("scancel", job)
        return f"job {job} cancelled"
    for place in (run, *tasks_of(run)):
        Records(place).ask_to_stop()
    for one in live:
        if one.state == "PENDING":  # tasks of an array that have not begun
            slurm.command("scancel", one.job)
    for one in running:
        slurm.command("scancel", "--batch", "--signal=USR1", one)
    return f"job {', '.join(running)} saves a checkpoint and ends"


def requeue(run: Path) -> str:
    """Release a run's held job and forget its failures; return what was done.

    For an array, this covers all tasks that are held or have failed.

    Raises:
        ClusterError: if nothing is held or has failed.
    """
    job = job_of(run)
    lines = slurm.command("scontrol", "show", "job", "-o", job).splitlines()
    records = [slurm.parse_record(line) for line in lines if line.strip()]
    wanted = {_number(record, job): verb for record in records if (verb := _way_back(record))}
    if not wanted:
        states = sorted({record.get("JobState", "unknown") for record in records})
        raise ClusterError(
            f"job {job} is {', '.join(states)} and not held; there is nothing to requeue"
        )
    for place in (run, *tasks_of(run)):
        Records(place).set_state(without_progress=0)
        Records(place).clear_stop()
    for number, verb in wanted.items():
        slurm.command("scontrol", verb, number)
    return "; ".join(f"job {number} {verb}d" for number, verb in wanted.items())


def _way_back(record: dict[str, str]) -> str:
    """Return the scontrol verb that lets a job try again; empty if it is running or waits its turn."""
    state = record.get("JobState", "")
    if (state == "PENDING" and record.get("Priority") == "0") or state.startswith("SPECIAL_EXIT"):
        return "release"
    is_at_work = state in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING")
    return "" if is_at_work or (state == "COMPLETED" and "ArrayJobId" in record) else "requeue"


def _number(record: dict[str, str], job: str) -> str:
    array, task = record.get("ArrayJobId"), record.get("ArrayTaskId")
    return f"{array}_{task}" if array and task else job


def watch(
    runs: list[Path] | None, *, every_seconds: float, once: bool, say: Callable[[str], None]
) -> None:
    """Start requeued jobs immediately, without the credential wait, until no job is left.

    A job cannot do this for itself: Slurm overwrites the start time while the job ends.

    Raises:
        ClusterError: for a run folder that does not exist, or a machine without Slurm.
    """
    require_folders(runs or [])
    slurm.require_program("squeue")
    wanted = None if runs is None else {os.path.realpath(run) for run in runs}
    refusal = ""
    while True:
        try:
            jobs = [j for j in slurm.queue() if j.comment == "megatron-eso"]
        except ClusterError as error:
            if once:
                raise
            if str(error) != refusal:  # a controller that starts again refuses for minutes
                refusal = str(error)
                say(f"looking again every {every_seconds:g} s: {refusal}")
            time.sleep(every_seconds)
            continue
        refusal = ""
        mine = [j for j in jobs if wanted is None or os.path.realpath(j.folder) in wanted]
        for job in mine:
            if job.state == "PENDING" and job.reason == "BeginTime":
                try:
                    slurm.command("scontrol", "update", f"jobid={job.job}", "starttime=now")
                except ClusterError as error:  # it may have started by itself
                    say(f"job {job.job}: {error}")
                else:
                    say(f"job {job.job}: started without waiting for the credential")
        if not mine:
            say("none of these runs has a job in the queue" if runs else "no job is in the queue")
        if once or not mine:
            return
        time.sleep(every_seconds)
