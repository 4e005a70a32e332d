"""Which rank a process is, according to the environment that its launcher set.

torchrun sets RANK; under ``srun`` only SLURM_* exist. These are pure functions of a mapping, so every
launcher's environment can be tested without that launcher.
"""

import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_eso.errors import ClusterError, ConfigError

GPUS_VARIABLE = "MEGATRON_ESO_GPUS"
"""GPUs per node that our job script requested."""
_PORT_FLOOR, _NUM_PORTS = 20000, 10000
_ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among all processes of the run."""

    rank: int
    world_size: int
    local_rank: int

    @staticmethod
    def from_environment(environ: Mapping[str, str]) -> "Ranks":
        """Return what torchrun or our Slurm launcher put into the environment; without one, a single rank.

        Raises:
            ConfigError: if a variable is not a number.
        """
        given = {name: environ.get(name, alone) for name, alone in _ALONE.items()}
        for name, value in given.items():
            if not value.isdecimal():
                raise ConfigError(
                    f"{name}={value} in the environment is not a number: a launcher (torchrun, srun) sets "
                    "it; unset it to start without a launcher"
                )
        return Ranks(*map(int, given.values()))


def rank_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of this process.

    Variables that are already set win. Under ``srun`` the rest comes from SLURM_PROCID, SLURM_NTASKS,
    SLURM_LOCALID, the first host of the (plain or bracketed) node list, and a port that differs
    from attempt to attempt, so that a requeued job does not meet the socket of the earlier attempt.
    An empty result means one process without a launcher.

    Raises:
        ClusterError: if a launcher set only some of the variables.
    """
    if "RANK" not in environ and not _is_srun_task(environ):
        return {}
    found = {name: environ[name] for name in _NAMES if name in environ}
    if "RANK" not in environ:
        found.setdefault("RANK", environ["SLURM_PROCID"])
        found.setdefault("WORLD_SIZE", environ.get("SLURM_NTASKS") or environ["SLURM_NPROCS"])
        found.setdefault("LOCAL_RANK", environ.get("SLURM_LOCALID", "0"))
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
        if nodes:
            found.setdefault("MASTER_ADDR", first_host(nodes))
        found.setdefault("MASTER_PORT", str(master_port(environ)))
    missing = [name for name in _NAMES if name not in found]
    if missing:
        raise ClusterError(
            f"RANK={found['RANK']} is set, but {', '.join(missing)} not; start ranks with torchrun, "
            "srun or `megatron-eso submit`, or unset RANK for a run on this machine"
        )
    return found


def local_environment(rank: int, number: int, port: int) -> dict[str, str]:
    """Return the same variables for one of ``number`` ranks that all run on this machine."""
    return {"RANK": str(rank), "WORLD_SIZE": str(number), "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip


def first_host(nodelist: str) -> str:
    """Return the first host of a Slurm node list: ``n[03-05,9],m1`` -> ``n03``.

    Slurm writes the list in its own (topology) order, and rank 0 runs on the first host.
    """
    match = re.match(r"([^,\[]+)(?:\[([^\]]+)\]([^,]*))?", nodelist)
    if not match:
        raise ClusterError(f"SLURM_JOB_NODELIST={nodelist!r} names no host")
    prefix, inner, suffix = match.groups()
    if inner is None:
        return prefix
    return prefix + re.split(r"[-,]", inner)[0] + (suffix or "")


def master_port(environ: Mapping[str, str]) -> int:
    """Return the rendezvous port of this attempt of this job."""
    job, restart = int(environ.get("SLURM_JOB_ID", 0)), int(environ.get("SLURM_RESTART_COUNT") or 0)
    return _PORT_FLOOR + (job * 7 + restart) % _NUM_PORTS


def attempt_name(environ: Mapping[str, str]) -> str:
    """Return JOBID.RESTART_COUNT under Slurm, else an empty string."""
    job = environ.get("SLURM_JOB_ID", "")
    return f"{job}.{environ.get('SLURM_RESTART_COUNT') or 0}" if job else ""


def node_name(environ: Mapping[str, str]) -> str:
    """Return Slurm's name for this node, or else the machine's own name."""
    return environ.get("SLURMD_NODENAME") or platform.node()


def is_of_job_script(environ: Mapping[str, str]) -> bool:
    """Return whether our job script runs this process; the script itself then holds the run's lease."""
    return bool(environ.get("MEGATRON_ESO_ATTEMPT"))


_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def _is_srun_task(environ: Mapping[str, str]) -> bool:
    """Return whether this is a task of ``srun``, not the batch script, where SLURM_PROCID is also 0."""
    return (
        "SLURM_PROCID" in environ
        and ("SLURM_NTASKS" in environ or "SLURM_NPROCS" in environ)
        and environ.get("SLURM_STEP_ID", "") not in ("", str(0xFFFFFFFB))
    )
