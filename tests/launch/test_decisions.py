"""What a job decides at its end, and which nodes it takes: pure decisions and the files behind them."""

import argparse
import time

import pytest

from megatron_eso.files import write_json
from megatron_eso.launch import attempt
from megatron_eso.launch.attempt import Ending, decide
from megatron_eso.launch.records import Records

PLAIN = Ending(
    status={}, has_progress=False, is_term=False, is_usr1=False, is_stop_asked=False,
    num_without_progress=0,
)  # fmt: skip


def ending(**changes):
    return Ending(**{**PLAIN.__dict__, **changes})


SAVED = {"state": "stopped", "reason": "SIGTERM"}


@pytest.mark.parametrize(
    "end, expected",
    [
        pytest.param(ending(status={"state": "finished"}), ("done", 0), id="finished"),
        pytest.param(
            ending(status={"state": "finished"}, is_term=True), ("done", 0), id="finished+TERM"
        ),
        pytest.param(
            ending(status=SAVED, is_term=True, has_progress=True), ("leave", 0), id="cancel"
        ),
        pytest.param(ending(status=SAVED, has_progress=True), ("requeue", 0), id="grace"),
        pytest.param(ending(status=SAVED), ("requeue", 0), id="preempted before any step"),
        pytest.param(ending(status=SAVED, is_usr1=True), ("requeue", 1), id="limit, nothing done"),
        pytest.param(ending(), ("requeue", 1), id="crash"),
        pytest.param(ending(num_without_progress=2), ("hold", 3), id="crash loop"),
        pytest.param(
            ending(num_without_progress=2, has_progress=True), ("requeue", 0), id="crash after work"
        ),
        pytest.param(
            ending(status=SAVED, is_usr1=True, is_stop_asked=True), ("done", 0), id="asked to stop"
        ),
        pytest.param(ending(is_term=True, is_stop_asked=True), ("leave", 0), id="cancelled twice"),
    ],
)
def test_the_status_file_and_the_signals_decide(end, expected):
    assert decide(end, 3)[:2] == expected


def test_a_stale_status_is_not_taken_for_this_attempts(tmp_path, monkeypatch):
    monkeypatch.setattr(attempt, "node_troubles", dict)
    records = Records(tmp_path)
    write_json(tmp_path / "status.json", {"state": "stopped", "updated": 5.0})
    assert attempt.begin(records, "1.0", ["a"]) == "go"
    options = argparse.Namespace(
        nodes="a", bad_node_hours=1.0, term=0, usr1=0, max_attempts=3, code=1, in_job_left=0
    )
    assert attempt.end(records, "1.0", options) == "requeue"
    assert records.state()["without_progress"] == 1
    assert "without a word" in records.events()[-1]["why"]


def test_a_finished_run_is_not_started_again(tmp_path, monkeypatch):
    monkeypatch.setattr(attempt, "node_troubles", dict)
    write_json(tmp_path / "status.json", {"state": "finished", "updated": 5.0})
    assert attempt.begin(Records(tmp_path), "1.1", ["a"]) == "done"


def test_a_finished_run_that_was_submitted_for_more_steps_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(attempt, "node_troubles", dict)
    write_json(tmp_path / "status.json", {"state": "finished", "total_steps": 100, "updated": 5.0})
    records = Records(tmp_path)
    records.set_state(total_steps=100)
    assert attempt.begin(records, "1.1", ["a"]) == "done"
    records.set_state(total_steps=200)
    assert attempt.begin(records, "2.0", ["a"]) == "go"


def test_a_run_that_was_asked_to_stop_does_not_begin_after_its_node_was_lost(tmp_path):
    records = Records(tmp_path)
    records.ask_to_stop()
    assert attempt.begin(records, "1.1", ["a"]) == "done"


def test_an_event_cut_off_by_a_power_loss_does_not_take_the_next_one_along(tmp_path):
    records = Records(tmp_path)
    records.add_event("1.0", "begin", nodes=["a"])
    with open(records.folder / "attempts.jsonl", "a") as file:
        file.write('{"attempt": "1.0", "ev')
    records.add_event("1.1", "begin", nodes=["b"])
    assert [event["nodes"] for event in records.events()] == [["a"], ["b"]]


def test_where_no_node_answers_the_check_did_not_run_and_no_node_is_blamed(tmp_path):
    records = Records(tmp_path)
    records.set_state(max_attempts=2)
    assert attempt.choose(records, "1.0", ["n0", "n1"], 2, True) == "requeue"
    assert attempt.choose(records, "1.0", ["n0", "n1"], 2, True) == "hold"
    assert not records.bad_nodes() and "ran on no node" in records.events()[-1]["why"]
    assert attempt.choose(records, "1.1", ["n0"], 1, True) == "hold n0"  # it may be this one


def test_nodes_lost_since_the_last_attempt_are_remembered(tmp_path, monkeypatch):
    records = Records(tmp_path)
    monkeypatch.setattr(attempt, "node_troubles", dict)
    attempt.begin(records, "1.0", ["a", "b"])
    monkeypatch.setattr(attempt, "node_troubles", lambda: {"b": "down*", "z": "drained"})
    attempt.begin(records, "1.1", ["a", "c"])
    assert set(records.bad_nodes()) == {"b"}


def test_a_spot_machine_that_was_taken_back_is_not_sick(tmp_path, monkeypatch):
    lines = "a|down|Preempted instance\nb|down*|Not responding\nc|idle|none\nd|drained|Prolog error"
    sinfo = tmp_path / "sinfo"
    sinfo.write_text(f"#!/bin/sh\ncat <<END\n{lines}\nEND\n")
    sinfo.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert attempt.node_troubles() == {
        "b": "Slurm says down* (Not responding)", "d": "Slurm says drained (Prolog error)"
    }  # fmt: skip


def test_healthy_nodes_are_taken_in_slurms_order(tmp_path):
    records = Records(tmp_path)
    for node, problems in (("n2", []), ("n1", ["no GPU"]), ("n0", [])):
        records.set_problems("1.0", node, problems)
    assert attempt.choose(records, "1.0", ["n2", "n1", "n0"], 2, True) == "run n2,n0"
    assert records.bad_nodes()["n1"]["reason"] == "no GPU"


def test_a_silent_node_is_sick_and_too_few_nodes_are_asked_anew(tmp_path):
    records = Records(tmp_path)
    records.set_state(max_attempts=2)
    records.set_problems("1.0", "n0", [])
    assert attempt.choose(records, "1.0", ["n0", "n1"], 2, True) == "requeue n1"
    assert attempt.choose(records, "1.0", ["n0", "n1"], 2, True) == "hold n1"


def test_a_remembered_node_that_is_well_again_is_the_last_choice(tmp_path):
    records = Records(tmp_path)
    records.add_bad_nodes({"n0": "was down"}, hours=1)
    assert attempt.choose(records, "1.0", ["n0", "n1", "n2"], 2, False) == "run n1,n2"
    assert attempt.choose(records, "1.0", ["n0", "n1"], 2, False) == "run n0,n1"


def test_bad_nodes_expire(tmp_path):
    records = Records(tmp_path)
    records.add_bad_nodes({"n0": "x"}, hours=1)
    until = records.bad_nodes()["n0"]["until"]
    assert records.bad_nodes(now=until - 1) and not records.bad_nodes(now=until)


def test_a_copy_of_a_checkpoint_under_another_name_is_passed_over(tmp_path):
    for name in ("step_0000000100", "step_0000000100_keep", "step_best"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "COMMITTED").touch()
    assert Records(tmp_path).checkpoint_step() == 100


def test_progress_is_a_committed_checkpoint(tmp_path):
    records = Records(tmp_path)
    for step, committed in ((5, True), (10, False)):
        folder = tmp_path / "checkpoints" / f"step_{step:010d}"
        folder.mkdir(parents=True)
        if committed:
            (folder / "COMMITTED").touch()
    assert records.checkpoint_step() == 5


def test_ranks_that_failed_start_again_in_the_job_while_it_may(tmp_path, monkeypatch):
    monkeypatch.setattr(attempt, "node_troubles", dict)
    records = Records(tmp_path)
    attempt.begin(records, "1.0", ["a"])
    options = argparse.Namespace(
        nodes="a", bad_node_hours=1.0, term=0, usr1=0, max_attempts=3, code=1, in_job_left=1
    )
    assert attempt.end(records, "1.0", options) == "again"
    assert records.events()[-1]["event"] == "again"
    options.in_job_left = 0
    assert attempt.end(records, "1.0", options) == "requeue"
    assert records.state()["without_progress"] == 2
    options.in_job_left = 5
    assert attempt.end(records, "1.0", options).startswith("hold")  # a crash loop is one here too


def test_the_script_of_a_cut_off_attempt_leaves_the_new_one_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(attempt, "node_troubles", lambda: {"a": "down"})
    records = Records(tmp_path)
    attempt.begin(records, "1.0", ["a"])
    attempt.begin(records, "1.1", ["b"])
    written = [path.read_text() for path in sorted(records.folder.glob("*.json*"))]
    options = argparse.Namespace(
        nodes="a", bad_node_hours=1.0, term=0, usr1=1, max_attempts=3, code=4, in_job_left=5
    )
    assert attempt.end(records, "1.0", options) == "leave"
    assert [path.read_text() for path in sorted(records.folder.glob("*.json*"))] == written


@pytest.mark.parametrize("signal", ["usr1", "term"])
def test_a_job_that_was_told_to_end_starts_nothing_again(tmp_path, monkeypatch, signal):
    monkeypatch.setattr(attempt, "node_troubles", dict)
    records = Records(tmp_path)
    attempt.begin(records, "1.0", ["a"])
    options = argparse.Namespace(**{
        "nodes": "a", "bad_node_hours": 1.0, "term": 0, "usr1": 0, "max_attempts": 3, "code": 1,
        "in_job_left": 5, signal: 1,
    })  # fmt: skip
    assert attempt.end(records, "1.0", options) in ("requeue", "leave")


def fault(start, node, cause="crash", attempt_name="1.0"):
    return {"event": "fault", "attempt": attempt_name, "start": start, "node": node, "cause": cause}


@pytest.mark.parametrize(
    "events, blamed",
    [
        pytest.param([fault("1", "a"), fault("1", "b"), fault("2", "a")], {"a"}, id="first twice"),
        pytest.param([fault("1", "a"), fault("2", "b")], set(), id="another each time"),
        pytest.param([fault("1", "a"), fault("1", "b")], set(), id="once"),
        pytest.param(
            [fault("1", "b"), fault("1", "a", "killed"), fault("2", "a")], {"a"}, id="a kill counts first"
        ),
        pytest.param([fault("1", "a", "hang"), fault("2", "a")], set(), id="a hang blames nobody"),
        pytest.param([fault("1", "a"), fault("2", "a", attempt_name="0.9")], set(), id="earlier attempt"),
        pytest.param([{"event": "fault", "cause": "crash"}] * 2, set(), id="not under Slurm"),
    ],
)  # fmt: skip
def test_a_node_whose_rank_always_fails_first_is_under_suspicion(events, blamed):
    assert attempt.suspects(events, "1.0").keys() == blamed


def test_a_node_that_the_cloud_announced_to_take_is_avoided_for_two_hours(tmp_path, monkeypatch):
    monkeypatch.setattr(attempt, "node_troubles", dict)
    monkeypatch.setenv("PATH", str(tmp_path))  # no Slurm to ask: all bad nodes are left out
    records = Records(tmp_path)
    attempt.begin(records, "1.0", ["a", "b"])
    records.announce("b", "the cloud announces maintenance")
    options = argparse.Namespace(
        nodes="a,b", bad_node_hours=24.0, term=0, usr1=0, max_attempts=3, code=0, in_job_left=0
    )
    assert attempt.end(records, "1.0", options) == "requeue b"
    left = records.bad_nodes()["b"]["until"] - time.time()
    assert 1.9 * 3600 < left < 2.1 * 3600 and records.take_announced() == []


def test_a_node_that_cannot_serve_is_left_out_and_in_the_end_the_job_is_held(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    records = Records(tmp_path)
    records.set_state(max_attempts=2, exclude="n9")
    assert attempt.unfit(records, "1.0", "a", "no plugin") == "requeue n9,a"
    assert attempt.unfit(records, "1.1", "b", "no plugin") == "hold n9,a,b"
    assert records.bad_nodes().keys() == {"a", "b"}
