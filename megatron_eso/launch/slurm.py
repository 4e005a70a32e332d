"""Slurm's commands: one runner, parsers of their output, and their refusals in our words.

We read the text output, not JSON, whose shape differs from version to version.
"""

import getpass
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from megatron_eso.errors import ClusterError

COMMENT = "megatron-eso"
"""Comment that distinguishes our jobs from others in the queue."""
QUEUE_FORMAT = "%i|%T|%r|%R|%M|%S|%k|%Z"
SINFO_FORMAT = "%R|%a|%D|%T|%G|%l|%c|%m"
_OUT_OF_SERVICE = ("down", "drain", "fail", "error", "unknown", "power")
SACCT_FIELDS = "JobIDRaw,State,ExitCode,Start,End,NodeList"

EXPLANATIONS = {
    "BeginTime": "requeued; Slurm waits for the old credential to expire (up to 2-10 min); "
    "`megatron-eso watch` or `scontrol update jobid=JOB starttime=now` starts it at once",
    "launch_failed_requeued_held": "a prolog failed and Slurm holds the job: `megatron-eso requeue "
    "RUN` (scontrol release) once the node is fixed",
    "JobHeldUser": "held; `megatron-eso requeue RUN` releases it",
    "job_requeued_in_held_state": "held after attempts without progress; `megatron-eso requeue RUN` "
    "tries again",
    "JobHeldAdmin": "held by an administrator",
    "ReqNodeNotAvail": "nodes it needs are down, drained or reserved for maintenance; a shorter "
    "time_limit may fit before a reservation",
    "Nodes_required_for_job_are_DOWN": "too few of the nodes it may have are in service, or partitions "
    "of higher priority reserve them",
    "PartitionConfig": "the partition can never give what is asked: ask for fewer nodes or GPUs, or less "
    "time",
    "PartitionNodeLimit": "more nodes than the partition allows",
    "PartitionTimeLimit": "time_limit is longer than the partition allows",
    "Resources": "waits for free nodes",
    "Priority": "other jobs go first",
    "JobArrayTaskLimit": "as many tasks of the array run as --throttle allows",
    "Dependency": "waits for its predecessor",
    "DependencyNeverSatisfied": "its predecessor failed, so it will never start; cancel it",
    "AssocGrpBillingMinutes": "the account has used up its budget",
    "QOSMaxJobsPerUserLimit": "you run as many jobs as the QOS allows",
}
_REFUSALS = (
    ("Requested node configuration is not available", "no set of nodes has what the profile asks "
     "for: look at nodes, gpus_per_node, gpu_type, cpus_per_task and memory"),
    ("invalid partition", "the partition does not exist; set partition= to one that sinfo lists"),
    ("Invalid account", "the account may not be used here; set account= and partition="),
    ("Invalid qos", "the QOS does not exist or is not allowed; set qos="),
    ("policy", "a limit of the account or QOS is reached; `sacctmgr show assoc` and `show qos` list them"),
    ("Invalid --time", "time_limit is not a Slurm time; write minutes, H:M:S or D-H:M:S"),
    ("time limit", "time_limit is longer than the partition or QOS allows"),
    ("More processors requested", "more CPUs or nodes than the partition has"),
    ("Node count specification invalid", "more nodes than the partition has; lower nodes="),
    ("Unable to contact slurm controller", "Slurm's controller does not answer; is it running?"),
)  # fmt: skip


@dataclass(frozen=True)
class QueuedJob:
    """A line of squeue."""

    job: str
    state: str
    reason: str
    nodes: str
    elapsed: str
    start: str
    comment: str
    folder: str

    @property
    def run(self) -> Path | None:
        """Folder, symbolic links resolved, that our job works on; None: the job is not ours."""
        return Path(os.path.realpath(self.folder)) if self.comment == COMMENT else None


@dataclass(frozen=True)
class NodeGroup:
    """A line of sinfo: nodes of a partition in the same state."""

    partition: str
    is_up: bool
    num_nodes: int
    state: str
    gpus: int
    time_limit: str
    cpus: int
    memory_mib: int


def command(*words: str, stdin: str | None = None, timeout_seconds: float = 60.0) -> str:
    """Run a Slurm command and return what it prints.

    Raises:
        ClusterError: if the command is not installed, refuses or does not answer. The message gives the
            reason in our words, with Slurm's text below it.
    """
    require_program(words[0])
    try:
        done = subprocess.run(
            words, input=stdin, capture_output=True, text=True, timeout=timeout_seconds
        )
    except subprocess.TimeoutExpired:
        raise ClusterError(f"{words[0]} did not answer within {timeout_seconds:g} s") from None
    if done.returncode:
        raise ClusterError(refusal(words[0], done.stderr.strip() or done.stdout.strip()))
    # sbatch --test-only writes its answer to stderr
    return done.stdout if done.stdout or words[0] != "sbatch" else done.stderr


def require_program(name: str) -> None:
    """Refuse a machine that lacks a Slurm command."""
    if not shutil.which(name):
        raise ClusterError(
            f"{name} is not on PATH: this is not a Slurm login node, or its module is not loaded; "
            "`megatron-eso submit --dry-run` prints the job script without Slurm"
        )


def refusal(program: str, text: str) -> str:
    """Return Slurm's refusal with the reason in our words before it."""
    for needle, ours in _REFUSALS:
        if needle.lower() in text.lower():
            return f"{ours}\n  {program} said: {text}"
    return f"{program} refused\n  {program} said: {text}"


def queue(*, job: str = "") -> list[QueuedJob]:
    """Return all jobs of the user, or one job, in one query; empty if that job has left the queue."""
    which = ["--jobs", job] if job else ["--user", getpass.getuser()]
    try:
        return parse_queue(command("squeue", "-h", "-a", *which, "-o", QUEUE_FORMAT))
    except ClusterError as error:
        if "Invalid job id" in str(error):
            return []
        raise


def parse_queue(text: str) -> list[QueuedJob]:
    """Return the jobs of ``squeue -h -o QUEUE_FORMAT``; a folder may contain the separator."""
    rows = [line.split("|", 7) for line in text.splitlines() if line.count("|") >= 7]
    return [QueuedJob(*row) for row in rows]


def parse_nodes(text: str) -> list[NodeGroup]:
    """Return the node groups of ``sinfo -h -o SINFO_FORMAT``."""
    groups = []
    for line in text.splitlines():
        name, up, number, state, gres, limit, cpus, memory = line.split("|")
        groups.append(
            NodeGroup(
                partition=name,
                is_up=up == "up",
                num_nodes=int(number),
                state=state,
                gpus=_gpus(gres),
                time_limit=limit,
                cpus=int(cpus.rstrip("+")),
                memory_mib=int(memory.rstrip("+")),
            )
        )
    return groups


def node_states(partition: str) -> dict[str, str]:
    """Return the state of every node of a partition or several (``a,b``); empty: Slurm's default one."""
    which = ["-p", partition] if partition else ["-a"]  # Slurm refuses both
    states = {}
    for line in command("sinfo", "-hN", *which, "-o", "%N|%T|%P").splitlines():
        node, state, name = line.split("|", 2)
        if partition or name.endswith("*"):  # the star marks the default
            states[node] = state
    return states


def expand(nodes: str) -> list[str]:
    """Return the names of a node list in Slurm's notation: ``n[1-2],m`` -> n1, n2, m."""
    return command("scontrol", "show", "hostnames", nodes).split() if nodes else []


def parse_record(text: str) -> dict[str, str]:
    """Return the fields of ``scontrol show job -o``; values may contain spaces and '='."""
    fields: dict[str, str] = {}
    name = ""
    for word in text.split(" "):
        key, equals, value = word.partition("=")
        if equals and key.replace(":", "").replace("/", "").replace("_", "").isalnum():
            name = key
            fields[name] = value.rstrip("\n")
        elif name:
            fields[name] += " " + word.rstrip("\n")
    return fields


def parse_accounting(text: str) -> list[dict[str, str]]:
    """Return the attempts of ``sacct -DXnP``, oldest first."""
    names = SACCT_FIELDS.split(",")
    rows = [line.split("|") for line in text.splitlines()]
    return [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names)]


def accounting(job: str) -> list[dict[str, str]]:
    """Return the attempts of a job from sacct; empty on a cluster without accounting."""
    try:
        return parse_accounting(command("sacct", "-DXnP", "-j", job, "-o", SACCT_FIELDS))
    except ClusterError:
        return []


def final_state(job: str) -> str:
    """Return the state of a job that has left squeue, from scontrol, else from sacct, else ''."""
    try:
        return parse_record(command("scontrol", "show", "job", "-o", job)).get("JobState", "")
    except ClusterError:
        attempts = accounting(job)
        return attempts[-1]["State"] if attempts else ""


def explain(job: QueuedJob) -> str:
    """Return what a job waits for, as text for the user."""
    if job.state == "CONFIGURING":
        return "its nodes are booting"
    # squeue writes some reasons with spaces that scontrol writes with underscores
    text = EXPLANATIONS.get(job.reason, EXPLANATIONS.get(job.reason.replace(" ", "_"), ""))
    text = text or EXPLANATIONS.get(_beginning(job), "")
    return text or ("" if job.reason == "None" else job.reason)


def lacks_nodes(job: QueuedJob) -> bool:
    """Return whether a job waits because nodes are down, drained or reserved."""
    return bool(_beginning(job))


def _beginning(job: QueuedJob) -> str:
    """Return the fixed beginning of a reason whose end varies (node list, Slurm version), else ''."""
    reason = job.reason.replace(" ", "_")
    return next(
        filter(reason.startswith, ("ReqNodeNotAvail", "Nodes_required_for_job_are_DOWN")), ""
    )


def is_out_of_service(state: str) -> bool:
    """Return whether a node in this state gets no job; a star marks a node that does not answer."""
    return state.startswith(_OUT_OF_SERVICE) or state.endswith("*")


def nodes_out_of_service() -> list[str]:
    """Return what is wrong with nodes that get no job, one line per state and reason."""
    groups = [
        line.split("|", 3)
        for line in command("sinfo", "-ah", "-o", "%D|%N|%T|%E").splitlines()
        if line.count("|") >= 3
    ]
    # A node is listed once for each of its partitions.
    return sorted(
        {
            f"{number} {'node is' if number == '1' else 'nodes are'} {state}: {names} ({reason})"
            for number, names, state, reason in groups
            if is_out_of_service(state)
        }
    )


def _gpus(gres: str) -> int:
    """Return the number of GPUs in a gres field: ``gpu:h100:8(S:0-1),other:1`` -> 8."""
    total = 0
    for item in gres.split(","):
        parts = item.split("(")[0].split(":")
        if parts[0] == "gpu" and parts[-1].isdigit():
            total += int(parts[-1])
    return total
