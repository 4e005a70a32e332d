"""Which bad nodes Slurm shall leave out: those that the job can do without."""

import pytest

from megatron_eso.launch.exclude import exclusions, to_leave_out
from megatron_eso.launch.records import Records

FOUR = dict.fromkeys(["n0", "n1", "n2", "n3"], "idle")


@pytest.mark.parametrize(
    "bad, states, always, need, out, kept",
    [
        pytest.param(["n0"], FOUR, [], 2, ["n0"], [], id="enough others"),
        pytest.param(["n0"], FOUR, [], 4, [], ["n0"], id="all are needed"),
        pytest.param(["n2", "n0"], FOUR, [], 3, ["n2"], ["n0"], id="the newest goes first"),
        pytest.param(["n0"], FOUR, ["n3"], 3, [], ["n0"], id="the site's list counts"),
        pytest.param(["n0"], {**FOUR, "n3": "down"}, [], 3, [], ["n0"], id="one is down"),
        pytest.param(["n3"], {**FOUR, "n3": "down"}, [], 3, ["n3"], [], id="down, not needed"),
        pytest.param(["n3"], {**FOUR, "n3": "down*"}, [], 4, [], ["n3"], id="down, waited for"),
        pytest.param(["gone"], FOUR, [], 2, ["gone"], [], id="of another partition"),
        pytest.param(["gone"], FOUR, [], 5, [], [], id="of another partition, and all are needed"),
    ],
)
def test_a_job_keeps_enough_nodes_to_start(bad, states, always, need, out, kept):
    assert to_leave_out(bad, states, always=always, need=need) == (out, kept)


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Slurm's commands as the partitions ``main`` (default, n0 to n3) and ``big`` (m0) answer."""
    lines = "\n".join([*(f"n{i}|idle|main*" for i in range(4)), "m0|idle|big"])
    answers = {"sinfo": f"cat <<END\n{lines}\nEND", "scontrol": "echo n3"}
    for name, does in answers.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


def run_with(tmp_path, *nodes):
    records = Records(tmp_path / "run")
    for hours, node in enumerate(nodes, 1):
        records.add_bad_nodes({node: "x"}, hours=hours)
    return records


def test_the_sites_own_list_stays_and_the_node_found_last_goes_first(tmp_path, commands):
    records = run_with(tmp_path, "n0", "n1")
    assert exclusions(records, partition="", need=2, always="n3") == (
        "n3,n1", "bad, but allowed, as the partition has too few others for 2 nodes: n0"
    )  # fmt: skip
    assert exclusions(records, partition="", need=1, always="n3")[0] == "n3,n0,n1"


def test_without_bad_nodes_the_sites_own_list_holds(tmp_path):
    assert exclusions(run_with(tmp_path), partition="", need=1, always="n3") == ("n3", "")
    assert exclusions(run_with(tmp_path), partition="", need=1, always="") == ("", "")


def test_where_slurm_does_not_answer_all_bad_nodes_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    nodes, said = exclusions(run_with(tmp_path, "n1", "n0"), partition="p", need=9, always="")
    assert nodes == "n0,n1" and "not on PATH" in said
