"""Launching by torchrun or ft_launcher: their commands, and what a rank tells ft_launcher's monitor."""

import sys
import types
from typing import ClassVar

import pytest

from megatron_eso.errors import ConfigError
from megatron_eso.launch import agents
from megatron_eso.launch.heartbeat import Heart

ARGUMENTS = ["train", "run.yaml", "name=a b"]


def command(agent):
    return agents.agent_command(agent, ARGUMENTS, num_ranks=4, max_restarts=3, setup_seconds=600)


def test_torchruns_command():
    words = command("torchrun")
    assert words[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert {"--nproc-per-node=4", "--max-restarts=3"} < set(words)
    assert words[-5:] == ["-m", "megatron_eso", *ARGUMENTS]


def test_ft_launcher_is_taken_where_it_is_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(agents.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(ConfigError, match=r"pip install nvidia-resiliency-ext.*--agent own"):
        command("ft_launcher")
    program = tmp_path / "bin" / "ft_launcher"
    program.parent.mkdir()
    program.touch(0o755)
    words = command("ft_launcher")
    assert words[0] == str(program) and "--ft-rank-heartbeat-timeout=600" in words
    assert words[-5:] == ["-m", "megatron_eso", *ARGUMENTS]


def test_an_unknown_agent_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="own, torchrun, ft_launcher"):
        command("mpirun")


class Client:
    """What ft_launcher's client is asked for."""

    CURRENT_TIMEOUTS_STATE_KEY = "current_timeouts"
    said: ClassVar[list] = []

    def init_workload_monitoring(self):
        self.said.append("connected")

    def load_state_dict(self, state):
        limits = state["current_timeouts"]["heartbeat"]
        assert limits["initial"] == limits["subsequent"] and limits["were_calculated"]
        self.said.append(limits["subsequent"])

    def send_heartbeat(self):
        self.said.append("alive")


def test_a_rank_tells_ft_launcher_that_it_is_alive_and_how_long_it_may_be_silent(monkeypatch):
    module = types.SimpleNamespace(RankMonitorClient=Client)
    monkeypatch.setitem(
        sys.modules, "nvidia_resiliency_ext", types.ModuleType("nvidia_resiliency_ext")
    )
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext.fault_tolerance", module)
    monkeypatch.setattr(Client, "said", [])
    heart = Heart({agents.FT_SOCKET: "/x"}, setup_seconds=600, floor_seconds=30, factor=3)
    heart.beat()
    assert Client.said == ["connected", 600, "alive", "alive"]
    for _ in range(3):
        heart.enter("step")
    assert Client.said[4:] == ["alive", 30, "alive", "alive"]


def test_without_ft_launcher_nothing_of_it_is_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext", None)
    Heart({}, setup_seconds=600, floor_seconds=30, factor=3).beat()
