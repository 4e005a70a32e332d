"""Parsers of Slurm's text, on output that record.py recorded from real clusters (recorded-VERSION/)."""

import time
from pathlib import Path

import pytest

from megatron_eso.errors import ClusterError
from megatron_eso.files import write_json
from megatron_eso.launch import slurm
from megatron_eso.launch.attempt import node_troubles
from megatron_eso.launch.records import Records
from megatron_eso.launch.report import StartUp, describe, goodput, one_line, start_up
from megatron_eso.launch.slurm import NodeGroup, QueuedJob

VERSIONS = ("22.05", "24.11")
RECORDED = {v: Path(__file__).parent / f"recorded-{v}" for v in VERSIONS}
both = pytest.mark.parametrize("version", VERSIONS)


def recorded(version, name):
    return (RECORDED[version] / name).read_text()


@both
def test_the_recording_is_of_the_version_it_says(version):
    assert f"slurm-wlm {version}." in recorded(version, "version.txt")


@both
def test_squeue_lines_become_jobs_even_with_a_hostile_folder(version):
    jobs = {job.job: job for job in slurm.parse_queue(recorded(version, "squeue.txt"))}
    assert len(jobs) == len(recorded(version, "squeue.txt").splitlines())
    assert jobs["2"].folder.endswith('it\'s a $(run); "x"|y') and jobs["2"].nodes == "n[0-1]"
    assert jobs["2"].state == "RUNNING" and slurm.explain(jobs["2"]) == ""
    assert {job.comment for job in jobs.values()} == {"megatron-eso"}
    assert {"7_[1-3%1]", "7_0"} <= jobs.keys()
    for job, words in (
        ("4", "held; `megatron-eso requeue"), ("6", "waits for its predecessor"), ("8", "credential"),
        ("9", "held after attempts without progress"), ("11", "a prolog failed and Slurm holds"),
        ("7_[1-3%1]", "--throttle"),
    ):  # fmt: skip
        assert words in slurm.explain(jobs[job]), (job, slurm.explain(jobs[job]))


def test_slurm_22_lets_an_impossible_job_wait_and_the_explanation_says_so():
    jobs = {job.job: job for job in slurm.parse_queue(recorded("22.05", "squeue.txt"))}
    assert "more nodes" in slurm.explain(jobs["3"])


@both
def test_sinfo_lines_become_node_groups(version):
    groups = slurm.parse_nodes(recorded(version, "sinfo.txt"))
    assert groups[0] == NodeGroup("main", True, 1, "draining", 8, "infinite", 4, 8000)
    assert {group.partition for group in groups} == {"main", "high", "closed", "short"}
    assert {g.time_limit for g in groups if g.partition == "short"} == {"10:00"}


@both
def test_a_drained_node_is_found_in_recorded_output(version, tmp_path, monkeypatch):
    sinfo = tmp_path / "sinfo"
    sinfo.write_text(f"#!/bin/sh\nexec cat '{RECORDED[version]}/sinfo_reasons.txt'\n")
    sinfo.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (node,) = node_troubles()
    assert node_troubles()[node] == "Slurm says draining (Prolog error)"


@pytest.mark.parametrize(
    "gres, gpus",
    [("gpu:h100:8", 8), ("gpu:8(S:0-1)", 8), ("(null)", 0), ("gpu:a:2,gpu:b:2,shard:4", 4)],
)
def test_gpus_are_counted_in_any_gres(gres, gpus):
    assert slurm.parse_nodes(f"p|up|1|idle|{gres}|1:00:00|4+|8000+")[0].gpus == gpus


@both
def test_a_record_of_scontrol_keeps_values_with_spaces_and_equals_signs(version):
    lines = recorded(version, "scontrol.txt").splitlines()
    records = {r["JobId"]: r for r in map(slurm.parse_record, lines)}
    states = {job: record["JobState"] for job, record in records.items()}
    assert states["1"] == "COMPLETED" and records["1"]["Restarts"] == "1"
    assert states["2"] == "RUNNING" and records["2"]["JobName"] == "a b"
    assert records["2"]["WorkDir"].endswith('it\'s a $(run); "x"|y')
    assert states["4"] == "PENDING" and records["4"]["JobName"] == "held job"
    held = {job for job, record in records.items() if record["Priority"] == "0"}
    assert held == {"4", "9", "11"}  # by the user, by our brake, by a failed prolog


def test_a_torn_record_loses_no_other_field():
    assert slurm.parse_record("JobId=1 Comment=a b=c d JobState=RUNNING\n")["JobState"] == "RUNNING"


@pytest.mark.parametrize(
    "version, options, words",
    [
        *((v, "-N9", "gpus_per_node") for v in VERSIONS),
        *((v, "-p nowhere", "set partition=") for v in VERSIONS),
        *((v, "-N1 --gpus-per-node=99", "gpus_per_node") for v in VERSIONS),
        *((v, "-N1 --mem=9999999", "memory") for v in VERSIONS),
        *((v, "-N1 -t soon", "time_limit") for v in VERSIONS),
        ("22.05", "-A nobody -N1", "set account="),
        ("22.05", "-N1 --qos=gold", "set qos="),
        ("22.05", "-N1 (one job a user)", "a limit of the account or QOS"),
    ],
)
def test_refusals_say_what_to_change_above_slurms_own_text(version, options, words):
    said = recorded(version, "refusals.txt").partition(f"== {options}\n")[2].partition("== ")[0]
    assert said
    text = slurm.refusal("sbatch", said.strip())
    assert words in text.splitlines()[0], text
    assert text.endswith(f"  sbatch said: {said.strip()}")


def test_a_refusal_nobody_foresaw_is_shown_as_it_is():
    assert slurm.refusal("sbatch", "Strange").endswith("sbatch said: Strange")


def test_accounting_lists_every_attempt():
    rows = slurm.parse_accounting(recorded("22.05", "sacct.txt"))
    assert [row["State"] for row in rows] == ["REQUEUED", "COMPLETED"]
    assert rows[0]["NodeList"] == "n[0-1]" and rows[0]["ExitCode"] == "0:0"


def slurm_that_says(folder, monkeypatch, **programs):
    """Put programs on PATH that print a text and exit with a code."""
    for name, (text, code) in programs.items():
        (folder / f"{name}.txt").write_text(text)
        program = folder / name
        to = ">&2" * bool(code)
        program.write_text(f"#!/bin/sh\ncat '{folder}/{name}.txt' {to}\nexit {code}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


GONE = ("slurm_load_jobs error: Invalid job id specified", 1)


def test_a_job_that_slurm_forgot_has_the_state_that_accounting_kept(tmp_path, monkeypatch):
    sacct = recorded("22.05", "sacct.txt")
    slurm_that_says(tmp_path, monkeypatch, scontrol=GONE, sacct=(sacct, 0))
    assert slurm.final_state("1") == "COMPLETED"


def test_without_accounting_a_forgotten_job_has_no_state(tmp_path, monkeypatch):
    refusal = recorded("24.11", "sacct_refusal.txt")
    assert "accounting storage is disabled" in refusal
    slurm_that_says(tmp_path, monkeypatch, scontrol=GONE, sacct=(refusal, 1))
    assert slurm.final_state("1") == "" and slurm.accounting("1") == []


def test_without_slurm_the_message_names_the_dry_run(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ClusterError, match="--dry-run"):
        slurm.command("sbatch")


def events(*rows):
    return [{"attempt": a, "event": e, "time": t, "nodes": []} for a, e, t in rows]


def test_goodput_adds_up_over_attempts():
    told = events(
        ("1.0", "begin", 0), ("1.0", "launching", 10), ("1.0", "end", 100),
        ("1.1", "begin", 150), ("1.1", "launching", 155),
    )  # fmt: skip
    found = goodput(told, step=7, is_running=True, now=255.0)
    assert (found.elapsed, found.in_job, found.training) == (255, 205, 190)
    cut_off = goodput(told, step=7, is_running=False, now=999.0)
    assert (cut_off.elapsed, cut_off.in_job) == (155, 105)
    assert goodput([], step=-1, is_running=False, now=0.0) is None


def test_the_start_up_is_that_of_the_newest_attempt_whose_ranks_met():
    told = [
        {"attempt": "1.0", "event": "begin", "time": 11.0, "started": 10.0},
        {"attempt": "1.0", "event": "launching", "time": 13.0},
        {"attempt": "1.0", "event": "again", "time": 100.0},
        {"attempt": "1.0", "event": "launching", "time": 101.0},
        {"attempt": "1.0", "event": "end", "time": 200.0},
        {"attempt": "1.1", "event": "begin", "time": 211.0, "started": 210.0},
        {"attempt": "1.1", "event": "launching", "time": 215.0},
    ]
    ledger = [
        {"event": "setup", "time": 30.0, "began": 23.0, "joined": 25.5},
        {"event": "setup", "time": 130.0, "began": 105.0, "joined": 106.0},
    ]
    found = start_up(told, ledger)
    assert found == StartUp("1.0", checks=3.0, imports=10.0, joining=2.5)
    assert found.line().startswith("15.5 s to the first collective of attempt 1.0: node checks 3.0")
    ledger.append({"event": "setup", "time": 240.0, "began": 216.0, "joined": 217.0})
    assert start_up(told, ledger) == StartUp("1.1", checks=5.0, imports=1.0, joining=1.0)
    assert start_up(told[:1], ledger) is None and start_up([], []) is None


def make_run(folder):
    records = Records(folder)
    records.add_event("4.0", "begin", nodes=["n0"], step=-1)
    records.add_bad_nodes({"n9": "Slurm says down"}, hours=2)
    status = {"state": "running", "step": 50, "total_steps": 100, "updated": time.time()}
    write_json(folder / "status.json", status)
    entry = '{"step": 50, "loss": 2.5, "tokens_per_second": 1000, "seconds_per_step": 2.0}\n'
    (folder / "metrics.jsonl").write_text(entry + '{"step": 51, "lo')
    records.set_submission(job="4")


def test_status_tells_everything_in_the_run_folder(tmp_path):
    make_run(tmp_path)
    job = QueuedJob("4", "PENDING", "BeginTime", "", "0:00", "", "megatron-eso", str(tmp_path))
    text = "\n".join(describe(tmp_path, job, time.time()))
    for words in ("4 PENDING", "credential", "step 50/100", "loss 2.5000", "ETA 00:01:40",
                  "bad node  n9", "no checkpoint yet", "attempts 1"):  # fmt: skip
        assert words in text, text
    assert "step 50/100" in one_line(tmp_path, job, time.time())


def test_a_finished_run_has_no_time_left_to_tell(tmp_path):
    make_run(tmp_path)
    status = {"state": "finished", "step": 100, "total_steps": 100, "updated": time.time()}
    write_json(tmp_path / "status.json", status)
    text = "\n".join(describe(tmp_path, None, time.time()))
    assert "step 100/100" in text and "ETA" not in text


def test_an_empty_run_folder_is_described_too(tmp_path):
    assert "has not started" in "\n".join(describe(tmp_path, None, 0.0))
