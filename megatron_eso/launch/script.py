"""The sbatch script of a run: a pure function of profile and run, so that tests can compare its text.

It has three parts: #SBATCH lines, which hold only values of the profile (checked in profile.py); shell
variables, every value quoted; and job.sh, the same text for every job. Names that a user chooses enter
through quoted variables and sbatch's arguments, never through #SBATCH lines.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from megatron_eso.errors import ClusterError
from megatron_eso.launch import slurm
from megatron_eso.launch.environment import GPUS_VARIABLE
from megatron_eso.launch.network import CONTAINERS, NETWORKS
from megatron_eso.launch.profile import ClusterProfile
from megatron_eso.launch.records import Records

_BODY = Path(__file__).with_name("job.sh")
OUTPUT = "slurm-%j.out"
ARRAY_OUTPUT = "%a/slurm-%A_%a.out"


@dataclass(frozen=True)
class Job:
    """What the script needs to know about a run."""

    name: str
    """Name of the run."""
    run: Path
    """Run folder, absolute, on a file system that the nodes see."""
    submit_folder: Path
    """Working folder of the ranks: relative data paths start here."""
    sweep: list[str] | None = None
    """Array: one override list per task (shell-split); None: a single run."""


def render(profile: ClusterProfile, job: Job) -> str:
    """Return the whole script.

    Raises:
        ClusterError: if a path holds characters that Slurm, a search path or a container's mounts do not
            allow in names.
    """
    has_container = profile.container.runtime != "none"
    for what, path, more in (
        (
            "folder",
            job.run,
            ":," if has_container else ":",
        ),  # this folder holds the job's code and is on PYTHONPATH
        ("the current folder", job.submit_folder, ":," if has_container else ""),
    ):
        if re.search(r"[\x00-\x1f\x7f]", str(path)):
            raise ClusterError(f"{what} {str(path)!r} has control characters; choose another name")
        taken = [character for character in more if character in str(path)]
        if taken:
            raise ClusterError(
                f"{what} {str(path)!r} has {taken[0]!r} in its name, which separates "
                f"{'the mounts of a container' if has_container else 'the folders of PYTHONPATH'}; "
                "choose another name"
            )
    return "\n".join(
        [
            "#!/bin/bash",
            f"# Written by `megatron-eso submit` for the cluster profile {quote_word(profile.name)}.",
            *(f"#SBATCH {option}" for option in directives(profile)),
            "",
            *(f"export {name}={shlex.quote(value)}" for name, value in profile.environment.items()),
            f"export {GPUS_VARIABLE}={profile.gpus_per_node}",
            *_variables(profile, job),
            "",
            *([*profile.setup, ""] if profile.setup else []),
            NETWORKS[profile.network] + CONTAINERS[profile.container.runtime] + _BODY.read_text(),
        ]
    )


def directives(profile: ClusterProfile) -> list[str]:
    """Return the sbatch options that follow from the profile."""
    survival = profile.survival
    gpus = f"{profile.gpu_type}:" * bool(profile.gpu_type) + str(profile.gpus_per_node)
    optional = {
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "switches": profile.switches,
        "gpus-per-node": gpus if profile.gpus_per_node else "",
    }
    return [
        *(f"--{name}={value}" for name, value in optional.items() if value),
        f"--nodes={profile.nodes + survival.spare_nodes}",
        f"--ntasks-per-node={profile.tasks_per_node}",
        f"--cpus-per-task={profile.cpus_per_task}",
        f"--mem={profile.memory}",
        *(["--exclusive"] if profile.exclusive else []),
        f"--time={profile.time_limit}",
        "--requeue" if survival.requeue == "requeue" else "--no-requeue",
        "--open-mode=append",
        f"--signal=B:USR1@{survival.signal_seconds}",
        f"--output={OUTPUT}",
        *(_directive(option) for option in profile.directives),
    ]


def job_name(name: str) -> str:
    """Return a run's name in a form that Slurm and file names accept."""
    return re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII).strip("_")[:60] or "run"


def identity(job: Job) -> list[str]:
    """Return the sbatch options that identify a job, or a successor that it submits, as ours."""
    return [f"--job-name={job_name(job.name)}", f"--comment={slurm.COMMENT}"]


def quote_word(text: str) -> str:
    """Return the text in a form that a shell comment can hold: printable, on one line."""
    return re.sub(r"[^\w .:/@+-]", "_", text, flags=re.ASCII)


def _directive(option: str) -> str:
    name, equals, value = option.partition("=")
    return name + equals + (shlex.quote(value) if value else "")


def _variables(profile: ClusterProfile, job: Job) -> list[str]:
    health, survival = profile.health, profile.survival
    records = Records(job.run)
    arguments = [f"--num-devices={health.num_devices}", f"--device-folder={health.device_folder}"]
    arguments += [f"--command={health.command}", f"--max-skew={health.max_clock_skew_seconds:g}"]
    train = [profile.python, "-m", "megatron_eso", "launch", str(records.config)]
    values: dict[str, object] = {
        "RUN": job.run,
        "SUBMIT_FOLDER": job.submit_folder,
        "CODE": records.code,
        "HOST_PYTHON": profile.host_python,
        "PYTHON": profile.python,
        "TRAIN": train,
        "TRAIN_NODES": profile.nodes,
        "TASKS_PER_NODE": profile.tasks_per_node,
        "SRUN_ARGUMENTS": profile.srun_arguments,
        "HEALTH": int(health.enabled),
        "MIN_PAIR_SPEED": f"{health.min_pair_gb_per_second:g}",
        "HEALTH_TIMEOUT": health.timeout_seconds,
        "HEALTH_ARGUMENTS": arguments,
        "REQUEUE": survival.requeue,
        "IN_JOB_RESTARTS": survival.in_job_restarts,
        "MAX_ATTEMPTS": survival.max_attempts_without_progress,
        "BAD_NODE_HOURS": f"{survival.bad_node_hours:g}",
        "POLL_METADATA": int(survival.poll_metadata),
    }
    if survival.requeue == "chain":
        options = [*identity(job), f"--chdir={job.run}"]
        values |= {"JOB_SCRIPT": records.script, "CHAIN_OPTIONS": options}
    if profile.container.runtime != "none":
        values |= {"IMAGE": profile.container.image, "MOUNTS": profile.container.mounts,
                   "ENVIRONMENT_NAMES": list(profile.environment)}  # fmt: skip
    lines = [f"{name}={_quoted(value)}" for name, value in values.items()] + _sweep(job)
    return lines + (_successor(job) if survival.requeue == "chain" else [])


def _sweep(job: Job) -> list[str]:
    """Return the lines that give an array task its own run folder and overrides."""
    if job.sweep is None:
        return []
    return [
        f"SWEEP={_quoted(job.sweep)}",
        'RUN=$RUN/${SLURM_ARRAY_TASK_ID:?this script is an array job}',
        'eval "TRAIN+=(${SWEEP[$SLURM_ARRAY_TASK_ID]})" # quoted by megatron-eso submit',
    ]  # fmt: skip


def _successor(job: Job) -> list[str]:
    """Return the lines with which an array's task submits itself again; empty for a single run."""
    if job.sweep is None:
        return []
    return [
        f'CHAIN_OPTIONS+=(--array="$SLURM_ARRAY_TASK_ID" --output={shlex.quote(ARRAY_OUTPUT)})',
    ]


def _quoted(value: object) -> str:
    if isinstance(value, list):
        return "(" + " ".join(shlex.quote(str(item)) for item in value) + ")"
    return shlex.quote(str(value))
