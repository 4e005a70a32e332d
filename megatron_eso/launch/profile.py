"""A cluster in one YAML file: partition, nodes, limits, network, container, and what to do about faults.

``configs/cluster/NAME.yaml`` holds a profile; ``--cluster`` takes a name or a path, and
``cluster.key=value`` overrides on the command line.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_eso.config.load import load_config
from megatron_eso.config.ranges import out_of_range, within
from megatron_eso.errors import ClusterError

PROFILES = Path(__file__).parents[2] / "configs" / "cluster"


@dataclass(frozen=True)
class ContainerConfig:
    """The container the ranks run in."""

    runtime: Literal["none", "pyxis", "apptainer"] = "none"
    """none: the host's Python; pyxis: srun's --container options (enroot); apptainer: exec."""
    image: str = ""
    """A .sqsh file on the shared file system (pyxis), or a .sif file (apptainer)."""
    mounts: list[str] = field(default_factory=list)
    """host:container pairs; the run folder, the submit folder, the network plugin, the data and
    checkpoint.init_from are added."""


@dataclass(frozen=True)
class HealthConfig:
    """What every node must pass before step 0."""

    enabled: bool = True
    """Check every node at the start of each attempt; a sick one is remembered and excluded."""
    num_devices: int = within(0, at_least=0)
    """Number of /dev/nvidiaN files a node must have; 0: do not look."""
    device_folder: str = "/dev"
    """Where the device files are."""
    command: str = ""
    """The site's own command, run by bash on each node; a non-zero exit means sick."""
    max_clock_skew_seconds: float = within(30.0, above=0)
    """Largest difference between a node's clock and the shared file system's; above it the node is sick."""
    min_pair_gb_per_second: float = within(0.0, at_least=0)
    """All-reduce speed in GB/s between one process of a node and one of a neighbor; a node below it
    with both neighbors is sick. 0: not measured, as this costs a start of torch on every node."""
    timeout_seconds: int = within(120, at_least=1)
    """Limit for the check of all nodes, and again for that of their pairs; a silent node is sick."""


@dataclass(frozen=True)
class SurvivalConfig:
    """What the job does about walltime, preemption and failures."""

    requeue: Literal["requeue", "chain", "never"] = "requeue"
    """requeue: `scontrol requeue`; chain: submit a successor (where the site forbids requeue); never."""
    signal_seconds: int = within(600, at_least=1)
    """Time before the limit at which the job is told to save (Slurm may be up to 60 s early)."""
    max_attempts_without_progress: int = within(3, at_least=1)
    """After this many attempts in a row without a newer checkpoint the job is held."""
    in_job_restarts: int = within(2, at_least=0)
    """Number of faults after which the ranks start again on the same nodes before the job is requeued."""
    bad_node_hours: float = within(24.0, at_least=0)
    """How long a node stays on the run's bad-node list."""
    spare_nodes: int = within(0, at_least=0)
    """Nodes to allocate beyond those that train; used where a health check fails."""
    poll_metadata: bool = False
    """Ask the cloud's metadata server about spot preemption and maintenance; no signal announces them."""


@dataclass(frozen=True)
class ClusterProfile:
    """Everything `submit` must know about a cluster."""

    name: str = "cluster"
    """Name of the profile."""
    partition: str = ""
    """Partition; empty: Slurm's default."""
    account: str = ""
    """Account to charge; empty: the user's default."""
    qos: str = ""
    """Quality of service; empty: default."""
    nodes: int = within(1, at_least=1)
    """Nodes that train."""
    tasks_per_node: int = within(1, at_least=1)
    """Ranks per node; one per GPU."""
    gpus_per_node: int = within(0, at_least=0)
    """GPUs to request per node; 0: none."""
    gpu_type: str = ""
    """Type in --gpus-per-node=TYPE:N; empty: any."""
    cpus_per_task: int = within(1, at_least=1)
    """CPUs per rank."""
    memory: str = "0"
    """--mem of a node; 0: all of it."""
    exclusive: bool = True
    """Take whole nodes."""
    time_limit: str = "1-00:00:00"
    """Walltime of one attempt: minutes, [D-]HH:MM:SS or D-HH."""
    switches: str = ""
    """--switches value (count[@max-wait]) to ask for nearby nodes; empty: none."""
    directives: list[str] = field(default_factory=list)
    """More sbatch options, each written as `--name=value`."""
    srun_arguments: list[str] = field(default_factory=list)
    """More srun options, written in the same way."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the job."""
    setup: list[str] = field(default_factory=list)
    """The site's shell lines, run unchanged before training (module load, source venv)."""
    python: str = "python3"
    """Python of the ranks (inside the container, if there is one)."""
    host_python: str = "python3"
    """Python 3.11+ of the batch script's helpers on the nodes; standard library only."""
    network: Literal["plain", "tcpx", "tcpxo", "gib"] = "plain"
    """plain: NCCL as it is; tcpx: A3 High; tcpxo: A3 Mega; gib: A3 Ultra."""
    hardware: str = ""
    """Hardware profile of the planner (configs/hardware): `submit` refuses a run that does not fit into
    the GPUs' memory and shows the planner's warnings. Empty: the planner is not asked."""
    checkpoint_gb_per_second: float = within(1.0, above=0, below=math.inf)
    """Speed at which all nodes together write a checkpoint; signal_seconds must leave time for one."""
    shared_folders: list[str] = field(default_factory=list)
    """Folders that login and compute nodes share; runs elsewhere are refused. Empty: not checked."""
    boot_minutes: int = within(0, at_least=0)
    """Time that a dynamic node may take to boot; `status` calls a wait up to it normal."""
    container: ContainerConfig = field(default_factory=ContainerConfig)
    """Container runtime and image."""
    health: HealthConfig = field(default_factory=HealthConfig)
    """Node checks."""
    survival: SurvivalConfig = field(default_factory=SurvivalConfig)
    """Requeue policy."""

    def excluded(self) -> str:
        """Return the nodes of the directive ``--exclude``, in Slurm's notation."""
        given = [o.partition("=")[2] for o in self.directives if o.startswith("--exclude=")]
        return given[-1] if given else ""


def load_profile(name: str, overrides: list[str] | None = None) -> ClusterProfile:
    """Return the profile from a YAML file, or by its name in configs/cluster.

    Raises:
        ClusterError: if there is no such profile, or its values cannot work.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else PROFILES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PROFILES.glob("*.yaml")))
        raise ClusterError(f"--cluster {name}: no file {path}; known profiles: {known}")
    profile = load_config(path, overrides, ClusterProfile)
    problems = list(_problems(profile))
    if problems:
        raise ClusterError(f"cluster profile {path.name}:\n  - " + "\n  - ".join(problems))
    return profile


def minutes_of(limit: str) -> float:
    """Return the minutes of a Slurm time limit: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises:
        ClusterError: if the limit has none of these forms.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if not match:
        raise ClusterError(
            f"time_limit={limit} is not a Slurm time; write minutes, H:M:S or D-H:M:S"
        )
    days, *rest = match.groups()
    first, second, third = (int(x) if x else 0 for x in rest)
    if days is not None:
        return int(days) * 1440 + first * 60 + second + third / 60
    if rest[2] is not None:
        return first * 60 + second + third / 60
    return first + second / 60


def _problems(profile: ClusterProfile) -> Iterator[str]:
    yield from _wrong_numbers(profile)
    yield from _wrong_words(profile)


def _wrong_numbers(profile: ClusterProfile) -> Iterator[str]:
    survival = profile.survival
    yield from (message for _, message in out_of_range(profile))
    limit = minutes_of(profile.time_limit)
    if limit * 60 <= survival.signal_seconds + 120:
        yield (
            f"time_limit={profile.time_limit} ({limit:g} min) leaves no time to train before "
            f"survival.signal_seconds={survival.signal_seconds}; use a longer limit"
        )


def _wrong_words(profile: ClusterProfile) -> Iterator[str]:
    if profile.container.runtime != "none" and not profile.container.image:
        yield f"container.runtime={profile.container.runtime} needs container.image; set it"
    for option in (*profile.directives, *profile.srun_arguments):
        if not re.fullmatch(r"--?[A-Za-z][\w-]*(=[^\x00-\x1f\x7f]*)?", option):
            yield f"option {option!r} must be of the form --name=value, on one line"
    for name in ("partition", "account", "qos", "gpu_type", "memory", "switches"):
        if not re.fullmatch(r"[\w.,:@+/-]*", getattr(profile, name)):
            yield f"{name}={getattr(profile, name)!r} has characters that Slurm names do not have"
    for key in profile.environment:
        if not re.fullmatch(r"[A-Za-z_]\w*", key):
            yield f"environment: {key!r} is not a variable name"
