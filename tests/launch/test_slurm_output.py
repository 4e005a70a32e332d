"""Parsers of Slurm's text, on output recorded from real clusters (recorded-VERSION/)."""

import time
from pathlib import Path

import pytest

from megatron_eso.errors import ClusterError
from megatron_eso.launch import slurm
from megatron_eso.launch.records import Records, write_json
from megatron_eso.launch.report import describe, goodput, one_line
from megatron_eso.launch.slurm import NodeGroup, QueuedJob

RECORDED = Path(__file__).parent / "recorded-22.05"


def recorded(name):
    return (RECORDED / name).read_text()


def test_squeue_lines_become_jobs_even_with_a_hostile_folder():
    jobs = slurm.parse_queue(recorded("squeue.txt"))
    assert [(j.job, j.state, j.reason) for j in jobs] == [
        ("3", "PENDING", "PartitionNodeLimit"), ("4", "PENDING", "JobHeldUser"), ("2", "RUNNING", "None"),
    ]  # fmt: skip
    assert jobs[2].folder.endswith('it\'s a $(run); "x"') and jobs[2].nodes == "n[0-1]"
    assert "more nodes" in slurm.explain(jobs[0]) and "requeue" in slurm.explain(jobs[1])
    assert slurm.explain(jobs[2]) == ""


def test_sinfo_lines_become_node_groups():
    groups = slurm.parse_nodes(recorded("sinfo.txt"))
    assert groups[0] == NodeGroup("main", True, 2, "mixed", 8, "infinite", 4, 8000)
    assert {group.partition for group in groups} == {"main", "grace", "high"}


@pytest.mark.parametrize(
    "gres, gpus",
    [("gpu:h100:8", 8), ("gpu:8(S:0-1)", 8), ("(null)", 0), ("gpu:a:2,gpu:b:2,shard:4", 4)],
)
def test_gpus_are_counted_in_any_gres(gres, gpus):
    assert slurm.parse_nodes(f"p|up|1|idle|{gres}|1:00:00|4+|8000+")[0].gpus == gpus


def test_a_record_of_scontrol_keeps_values_with_spaces_and_equals_signs():
    records = [slurm.parse_record(line) for line in recorded("scontrol.txt").splitlines()]
    assert [r["JobState"] for r in records] == ["RUNNING", "PENDING", "PENDING"]
    assert records[2]["JobName"] == "held job" and records[2]["Priority"] == "0"
    assert records[0]["WorkDir"].endswith('it\'s a $(run); "x"')


def test_a_torn_record_loses_no_other_field():
    assert slurm.parse_record("JobId=1 Comment=a b=c d JobState=RUNNING\n")["JobState"] == "RUNNING"


def test_refusals_say_what_to_change_above_slurms_own_text():
    said = recorded("refusals.txt")
    for line, words in (
        ("Requested node configuration is not available", "gpus_per_node"),
        ("invalid partition specified: nowhere", "set partition="),
    ):
        assert line in said
        text = slurm.refusal("sbatch", line)
        assert words in text.splitlines()[0] and line in text.splitlines()[1]
    assert slurm.refusal("sbatch", "Strange").endswith("sbatch said: Strange")


def test_accounting_lists_every_attempt():
    text = "7|REQUEUED|0:0|t0|t1|n[0-1]\n7|COMPLETED|0:0|t2|t3|n[1-2]\n"
    assert [row["State"] for row in slurm.parse_accounting(text)] == ["REQUEUED", "COMPLETED"]


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


def make_run(folder):
    records = Records(folder)
    records.add_event("4.0", "begin", nodes=["n0"], step=-1)
    records.add_bad_nodes({"n9": "Slurm says down"}, hours=2)
    status = {"state": "running", "step": 50, "total_steps": 100, "updated": time.time()}
    write_json(folder / "status.json", status)
    entry = '{"step": 50, "loss": 2.5, "tokens_per_second": 1000, "tokens": 100000}\n'
    (folder / "metrics.jsonl").write_text(entry + '{"step": 51, "lo')
    write_json(folder / "slurm" / "job.json", {"job": "4"})


def test_status_tells_everything_in_the_run_folder(tmp_path):
    make_run(tmp_path)
    job = QueuedJob("4", "PENDING", "BeginTime", "", "0:00", "", "megatron-eso", str(tmp_path))
    text = "\n".join(describe(tmp_path, job, time.time()))
    for words in ("4 PENDING", "credential", "step 50/100", "loss 2.5000", "ETA 00:01:40",
                  "bad node  n9", "no checkpoint yet", "attempts 1"):  # fmt: skip
        assert words in text, text
    assert "step 50/100" in one_line(tmp_path, job, time.time())


def test_an_empty_run_folder_is_described_too(tmp_path):
    assert "has not started" in "\n".join(describe(tmp_path, None, 0.0))
