"""Ranks from the environment of torchrun, srun, or nothing."""

import pytest

from megatron_eso.errors import ClusterError, ConfigError
from megatron_eso.launch.environment import Ranks, first_host, master_port, rank_environment

SRUN = {
    "SLURM_JOB_ID": "12", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0", "SLURM_JOB_NODELIST": "a3-[007-008]",
}  # fmt: skip


def test_srun_gives_every_name():
    assert rank_environment(SRUN) == {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1",
        "MASTER_ADDR": "a3-007", "MASTER_PORT": str(20000 + 84),
    }  # fmt: skip


def test_a_launcher_that_set_the_names_wins():
    given = {**SRUN, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    given |= {"MASTER_ADDR": "x", "MASTER_PORT": "1"}
    assert rank_environment(given)["MASTER_ADDR"] == "x"
    assert rank_environment({**SRUN, "MASTER_ADDR": "10.0.0.1"})["MASTER_ADDR"] == "10.0.0.1"


@pytest.mark.parametrize("missing", ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID"])
def test_without_a_launcher_nothing_is_set(missing):
    assert rank_environment({k: v for k, v in SRUN.items() if k != missing}) == {}
    assert rank_environment({}) == {}


def test_the_batch_script_itself_is_no_rank():
    assert rank_environment({**SRUN, "SLURM_STEP_ID": "4294967291"}) == {}


def test_half_a_launcher_is_refused_with_the_missing_names():
    with pytest.raises(ClusterError, match="MASTER_ADDR"):
        rank_environment({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})


@pytest.mark.parametrize(
    "nodes, first",
    [("n0", "n0"), ("n1,n0", "n1"), ("n[2,0-1]", "n2"), ("a[01-16]-x,b", "a01-x"), ("b,a[1]", "b")],
)
def test_the_first_host_keeps_slurms_order(nodes, first):
    assert first_host(nodes) == first


def test_an_attempt_gets_another_port():
    assert master_port({"SLURM_JOB_ID": "5"}) != master_port(
        {"SLURM_JOB_ID": "5", "SLURM_RESTART_COUNT": "1"}
    )


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
@pytest.mark.parametrize("value", ["x", "", "-1"])
def test_a_rank_that_is_no_number_names_its_variable(name, value):
    assert Ranks.from_environment({"RANK": "1", "WORLD_SIZE": "2"}) == Ranks(1, 2, 0)
    with pytest.raises(ConfigError, match=f"{name}={value} in the environment is not a number"):
        Ranks.from_environment({name: value})
