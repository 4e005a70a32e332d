"""What `megatron-eso status` prints: the job, the run, its attempts and its bad nodes.

One Slurm query serves any number of runs; everything else comes from the run folders.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from megatron_eso.files import parse_json
from megatron_eso.launch import slurm
from megatron_eso.launch.events import read_events
from megatron_eso.launch.ledger import account
from megatron_eso.launch.records import Records

_TAIL_BYTES = 4096


@dataclass(frozen=True)
class Goodput:
    """Where a run's time went, in seconds."""

    elapsed: float
    """From the first event to the last event (or to now, while the job runs)."""
    in_job: float
    """Sum over attempts."""
    training: float
    """From the ranks' start to the attempt's end, summed over attempts."""
    num_attempts: int
    steps_kept: int
    """Step of the newest checkpoint."""

    def lines(self) -> list[str]:
        """Return the report."""
        whole = max(self.elapsed, 1e-9)
        return [
            f"attempts {self.num_attempts}, steps kept {self.steps_kept}",
            f"time {_clock(self.elapsed)}: ranks running {_clock(self.training)} "
            f"({self.training / whole:.0%}), start-up and checks "
            f"{_clock(self.in_job - self.training)} ({(self.in_job - self.training) / whole:.0%}), "
            f"waiting for nodes {_clock(whole - self.in_job)} ({1 - self.in_job / whole:.0%})",
        ]


def goodput(events: list[dict], *, step: int, is_running: bool, now: float) -> Goodput | None:
    """Return the times of all attempts from RUN/slurm/attempts.jsonl; None before the first attempt.

    An attempt that was cut off (node failure, KILL) has no end event; its last event counts as the end,
    so its time is a lower bound.
    """
    attempts: dict[str, list[dict]] = {}
    for event in events:
        attempts.setdefault(event["attempt"], []).append(event)
    if not attempts:
        return None
    in_job = training = 0.0
    last = list(attempts)[-1]
    for name, own in attempts.items():
        stop = now if is_running and name == last else own[-1]["time"]
        launch = [e["time"] for e in own if e["event"] == "launching"]
        in_job += stop - own[0]["time"]
        training += stop - launch[0] if launch else 0.0
    finish = now if is_running else events[-1]["time"]
    return Goodput(finish - events[0]["time"], in_job, training, len(attempts), step)


@dataclass(frozen=True)
class StartUp:
    """Seconds from the first line of the job script to the first collective."""

    attempt: str
    checks: float
    """Helpers and node checks, until srun starts the ranks."""
    imports: float
    """srun, container, and Python's imports on rank 0."""
    joining: float
    """Process groups and the first exchange between all ranks."""

    def line(self) -> str:
        """Return the report."""
        whole = self.checks + self.imports + self.joining
        return (
            f"{whole:.1f} s to the first collective of attempt {self.attempt}: node checks "
            f"{self.checks:.1f}, starting ranks {self.imports:.1f}, joining {self.joining:.1f}"
        )


def start_up(events: list[dict], ledger: list[dict]) -> StartUp | None:
    """Return the start-up of the newest attempt whose ranks met; None if there is none.

    Args:
        events: RUN/slurm/attempts.jsonl.
        ledger: RUN/events.jsonl, whose ``setup`` events rank 0 writes. Both hold wall clock times, one of
            the first node and one of rank 0's node, which are the same machine in most jobs.
    """
    found = None
    for index, launch in enumerate(events):
        if launch["event"] != "launching" or events[index - 1]["event"] != "begin":
            continue  # ranks that start again within an attempt find their imports in the page cache
        started = events[index - 1].get("started")
        later = next((e["time"] for e in events[index + 1 :]), float("inf"))
        met = [e for e in ledger if e["event"] == "setup" and launch["time"] < e["time"] < later]
        if started and met and "joined" in met[0]:
            checks = launch["time"] - started
            imports = met[0]["began"] - launch["time"]
            joining = met[0]["joined"] - met[0]["began"]
            found = StartUp(launch["attempt"], checks, imports, joining)
    return found


def job_of_task(run: Path, jobs: list[slurm.QueuedJob]) -> slurm.QueuedJob | None:
    """Return the job of an array's task: its own line of squeue, or the line of all waiting tasks."""
    number = str(Records(run).submission().get("job", ""))
    array, underscore, _ = number.partition("_")
    if not underscore:
        return None
    own = [job for job in jobs if job.job == number]
    return next(iter(own or [job for job in jobs if job.job.startswith(f"{array}_[")]), None)


def one_line(run: Path, job: slurm.QueuedJob | None, now: float) -> str:
    """Return the overview line of a run."""
    status = Records(run).status()
    state = job.state if job else status.get("state", "no job")
    text = f"{run.name:24.24}  {job.job if job else '-':>8}  {state:12}  {_progress(run, status)}"
    why = slurm.explain(job) if job and job.state != "RUNNING" else ""
    return f"{text}  {why}".rstrip()


def describe(run: Path, job: slurm.QueuedJob | None, now: float, *, unasked: str = "") -> list[str]:
    """Return everything known about a run, as lines.

    Args:
        run: its folder.
        job: its line of the queue, if any.
        now: the time.
        unasked: why Slurm says nothing of it; empty: it was asked.
    """
    records = Records(run)
    status, submitted = records.status(), records.submission()
    lines = [f"run       {run}"]
    number = job.job if job else submitted.get("job", "")
    if job:
        where = f"on {job.nodes}, for {job.elapsed}" if job.state == "RUNNING" else ""
        lines.append(f"job       {number} {job.state} {where}".rstrip())
        why = slurm.explain(job) if job.state != "RUNNING" else ""
        if job.state == "CONFIGURING" and submitted.get("boot_minutes"):
            why += f"; up to {submitted['boot_minutes']} min is normal here"
        lines += [f"          {why}"] if why else []
        if slurm.lacks_nodes(job):
            lines += [f"          {group}" for group in slurm.nodes_out_of_service()]
    elif unasked:
        lines.append(f"job       {number}: {unasked}" if number else f"          {unasked}")
    elif number:
        final = slurm.final_state(number)
        lines.append(f"job       {number} {final or 'has left the queue'}")
        if final and not list(run.glob("slurm-*.out")):
            lines.append(
                "          it wrote no output: do the nodes see this folder? "
                "(cluster.shared_folders lists those they do)"
            )
    lines.append(f"progress  {_progress(run, status)}")
    if "updated" in status:
        why = f": {str(status['reason']).splitlines()[0]}" if status.get("reason") else ""
        lines.append(
            f"updated   {_clock(now - status['updated'])} ago, state {status['state']}{why}"
        )
    kept = records.checkpoint_step()
    lines.append(f"saved     step {kept}" if kept >= 0 else "saved     no checkpoint yet")
    for node, entry in records.bad_nodes(now).items():
        left = _clock(entry["until"] - now)
        lines.append(f"bad node  {node}: {entry['reason']} (for {left} more)")
    held = records.held()
    if held:
        lines.append(f"held      {held['why']}; `megatron-eso requeue` tries again")
    ends = [event for event in records.events() if event["event"] == "end"]
    lines += [f"ended     {e['attempt']}: {e['decision']}, {e['why']}" for e in ends[-3:]]
    spent = goodput(
        records.events(), step=kept, is_running=bool(job and job.state == "RUNNING"), now=now
    )
    ledger = read_events(run)
    begun = start_up(records.events(), ledger)
    lines += [f"start-up  {begun.line()}"] if begun else []
    # A run that no job of ours did: `megatron-eso goodput` tells more.
    told = spent.lines() if spent else account(ledger).lines()[:2] if ledger else []
    return lines + [f"goodput   {line}" for line in told]


def _progress(run: Path, status: dict) -> str:
    if "step" not in status:
        return "has not started"
    total, step = status.get("total_steps"), status["step"]
    text = f"step {step}/{total}" if total else f"step {step}"
    last = _last_metrics(run)
    loss = last.get("loss", status.get("loss"))
    speed, seconds = last.get("tokens_per_second"), last.get("seconds_per_step")
    text += f"  loss {loss:.4f}" if isinstance(loss, (int, float)) else ""
    text += f"  {speed:,.0f} tokens/s" if isinstance(speed, (int, float)) else ""
    if total and step < total and isinstance(seconds, (int, float)):
        text += f"  ETA {_clock((total - step) * seconds)}"
    return text


def _last_metrics(run: Path) -> dict:
    """Return the last whole line of metrics.jsonl that holds a loss, reading only the file's end."""
    try:
        with open(run / "metrics.jsonl", "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        if "loss" in (entry := parse_json(line)):
            return entry
    return {}


def _clock(seconds: float) -> str:
    seconds = max(int(seconds), 0)
    days, rest = divmod(seconds, 86400)
    return f"{days}d " * bool(days) + time.strftime("%H:%M:%S", time.gmtime(rest))
