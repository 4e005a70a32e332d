"""Other launchers for the ranks of one machine: torchrun's elastic agent and NVIDIA's ft_launcher.

Our own launcher (supervisor.py) needs neither. Under ft_launcher, a rank's :class:`FtMonitor` forwards
the heartbeats and limits of ``heartbeat.py``, so ft_launcher detects hangs by the same limits. torchrun
sees only deaths.
"""

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_eso.errors import ConfigError
from megatron_eso.launch.processes import free_port

AGENTS = ("own", "torchrun", "ft_launcher")
FT_SOCKET = "FT_RANK_MONITOR_IPC_SOCKET"  # ft_launcher tells its ranks where their monitor listens


def agent_command(
    agent: str, arguments: Sequence[str], *, num_ranks: int, max_restarts: int, setup_seconds: float
) -> list[str]:
    """Return the command that starts and supervises the ranks.

    Args:
        agent: torchrun or ft_launcher.
        arguments: what follows ``python -m megatron_eso``.
        num_ranks: ranks on this machine.
        max_restarts: restarts after faults; these launchers count them even if there was progress.
        setup_seconds: ft_launcher's limit until a rank sends its own.

    Raises:
        ConfigError: for an unknown agent, or one that is not installed.
    """
    if agent == "torchrun":
        start = [sys.executable, "-m", "torch.distributed.run", "--rdzv-endpoint=localhost:0"]
    elif agent == "ft_launcher":
        start = [_ft_launcher(), f"--rdzv-endpoint=localhost:{free_port()}",
                 f"--ft-initial-rank-heartbeat-timeout={setup_seconds:g}",
                 f"--ft-rank-heartbeat-timeout={setup_seconds:g}",
                 "--ft-workload-check-interval=1"]  # fmt: skip
    else:
        raise ConfigError(f"--agent {agent}: choose one of {', '.join(AGENTS)}")
    return [*start, "--rdzv-backend=c10d", f"--nproc-per-node={num_ranks}",
            f"--max-restarts={max_restarts}", "--monitor-interval=0.5", "-m", "megatron_eso",
            *arguments]  # fmt: skip


def agent_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of an agent: restarted ranks must not meet the port of its own store."""
    return {**environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


class FtMonitor:
    """A rank's connection to the ft_launcher monitor that watches it."""

    def __init__(self, client: Any) -> None:
        self._client, self._limit = client, 0.0
        client.init_workload_monitoring()

    @classmethod
    def find(cls, environ: Mapping[str, str]) -> "FtMonitor | None":
        """Return the connection, or None if ft_launcher did not start this process."""
        if FT_SOCKET not in environ:
            return None
        from nvidia_resiliency_ext.fault_tolerance import (  # pyright: ignore[reportMissingImports]
            RankMonitorClient,
        )

        return cls(RankMonitorClient())

    def beat(self, limit_seconds: float) -> None:
        """Report that this rank is alive, and how long it may stay silent from now on."""
        if limit_seconds != self._limit:
            self._limit = limit_seconds
            limits = {
                "initial": limit_seconds,
                "subsequent": limit_seconds,
                "were_calculated": True,
            }
            self._client.load_state_dict(
                {self._client.CURRENT_TIMEOUTS_STATE_KEY: {"heartbeat": limits}}
            )
        self._client.send_heartbeat()


def _ft_launcher() -> str:
    beside = Path(sys.executable).with_name("ft_launcher")
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("ft_launcher")
    if found is None:
        raise ConfigError(
            "--agent ft_launcher: it is not installed (pip install nvidia-resiliency-ext); --agent own "
            "needs no package and sees hangs too"
        )
    return found
