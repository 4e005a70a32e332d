"""What the job does about everything that can happen to it, on a real cluster.

The trainer is the stand-in with the trainer's contract (stand_in/trainer.py); the batch script,
its helpers, sbatch, srun and the signals are real. Walltime, preemption without grace, dead nodes and
a split network are in test_real_trainer.py.
"""

import json
import re
import time

import pytest

from tests.slurm_cluster.conftest import ROOT, command, field, state, wait_for
from tests.slurm_cluster.submitted import Run


def test_a_run_with_a_hostile_name_finishes(slurm, tmp_path):
    run = Run(slurm, tmp_path / 'it\'s a $(run); "x"', 'name="a b"')
    run.wait_state("COMPLETED")
    assert "rank 0/2 start at 0" in run.log() and "rank 1/2 start at 0" in run.log()
    assert "finished at 20" in run.log()
    nodes = {line.split()[1] for line in run.log().splitlines()}
    assert len(nodes) == 2
    assert (run.folder / "slurm" / "code" / "megatron_eso").is_dir()


def test_a_dead_rank_is_restarted_within_the_job(slurm, tmp_path):
    """srun's TERM makes the other rank save at step 7; the same attempt goes on from there."""
    fault = {"crash": {"restart": [0], "rank": 1, "step": 7}}
    run = Run(slurm, tmp_path / "r", "cluster.survival.in_job_restarts=1", fault=fault)
    run.wait_state("COMPLETED")
    log = run.log()
    assert log.count("CRASH") == 1 and "finished at 20" in log
    assert f"{run.job}.1" not in log  # the job was never requeued
    assert "decision: again, restart 1 of 1 in this job" in run.output()


def test_preemption_with_grace_is_requeued_by_the_script(slurm, tmp_path):
    """A trainer that saves and exits inside the grace is not requeued by Slurm."""
    run = Run(slurm, tmp_path / "r", "cluster.partition=grace", fault={"endless": [0]})
    run.wait_log("rank 0/2 start at 0")
    slurm.run("sbatch", "-p", "high", "-N5", "--exclusive", "-o", tmp_path / "hi", "--wrap", "true")
    run.wait_log("on SIGTERM")
    run.wait_state("COMPLETED")
    assert f"finished at {max(run.saved(), 20)}\n" in run.log()
    assert "decision: requeue" in run.output()


def test_a_cancelled_job_stays_cancelled(slurm, tmp_path):
    run = Run(slurm, tmp_path / "r", fault={"endless": [0]})
    run.wait_log("rank 0/2 start at 0")
    slurm.run("scancel", run.job)
    run.wait_state("CANCELLED")
    time.sleep(6)
    assert state(slurm, run.job) == "CANCELLED" and field(slurm, run.job, "Restarts") == "0"


def test_a_crash_loop_is_held_and_says_why(slurm, tmp_path):
    crash = {"restart": [0, 1, 2, 3], "rank": 1, "step": 2}
    run = Run(
        slurm, tmp_path / "r", "cluster.survival.max_attempts_without_progress=2",
        fault={"crash": crash, "save_nothing": True},
    )  # fmt: skip
    run.wait_log("CRASH")
    run.hurry()
    wait_for(lambda: (run.folder / "slurm" / "held.json").exists())
    wait_for(lambda: field(slurm, run.job, "Priority") == "0")
    assert "2 attempts in a row without a new checkpoint" in run.records("held.json")["why"]
    assert run.log().count("CRASH") == 2
    assert "held      2 attempts in a row" in command("status", run.folder).stdout


def test_cancel_after_checkpoint_ends_the_job_and_submit_continues_it(slurm, tmp_path):
    run = Run(slurm, tmp_path / "r", fault={"endless": [0]})
    run.wait_log("rank 0/2 start at 0")
    run.wait_log("rank 1/2 start at 0")
    with pytest.raises(AssertionError, match=r"already works on "):
        Run(slurm, tmp_path / "r")
    assert "saves a checkpoint" in command("cancel", "--after-checkpoint", run.folder).stdout
    run.wait_state("COMPLETED")
    assert "on SIGUSR1" in run.log() and field(slurm, run.job, "Restarts") == "0"
    saved = run.saved()
    again = Run(slurm, tmp_path / "r", fault={"steps": saved + 10})
    again.wait_state("COMPLETED")
    assert saved > 0 and f"{again.job}.0" in run.log() and f"start at {saved}\n" in run.log()
    assert f"finished at {saved + 10}" in run.log()


def test_a_sick_node_is_left_out_before_step_0(slurm, tmp_path):
    run = Run(
        slurm, tmp_path / "r", "cluster.survival.spare_nodes=1",
        "cluster.health.command='test $SLURMD_NODENAME != n0 || { echo broken link; exit 1; }'",
    )  # fmt: skip
    run.wait_state("COMPLETED")
    assert "broken link" in run.records("bad_nodes.json")["n0"]["reason"]
    assert " n0 " not in run.log() and "finished" in run.log()


def test_a_node_with_a_slow_network_is_left_out(slurm, tmp_path):
    """All-reduces between neighbours: one node's network is throttled to 100 Mbit/s."""
    throttle = ["tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "100mbit", "burst", "128k",
                "latency", "200ms"]  # fmt: skip
    inside = ["nsenter", "--target", slurm.pids("n1")[-1], "--net"]
    if slurm.run(*inside, *throttle, check=False).returncode:
        pytest.skip("NO TRAFFIC SHAPING: `tc qdisc add ... tbf` does not work on this machine")
    try:
        run = Run(
            slurm, tmp_path / "r", "cluster.survival.spare_nodes=1",
            "cluster.health.min_pair_gb_per_second=0.05",
        )  # fmt: skip
        run.wait_state("COMPLETED")
    finally:
        slurm.run(*inside, "tc", "qdisc", "del", "dev", "eth0", "root")
    (bad,) = run.records("bad_nodes.json").items()
    assert bad[0] == "n1" and "all-reduce below 0.05 GB/s" in bad[1]["reason"]
    assert run.events("launching")[0]["nodes"] == ["n0", "n2"]


def test_too_few_healthy_nodes_requeues_on_others(slurm, tmp_path):
    run = Run(
        slurm, tmp_path / "r",
        "cluster.health.command='test $SLURMD_NODENAME != n0'",
    )  # fmt: skip
    wait_for(lambda: (run.folder / "slurm" / "bad_nodes.json").exists())
    run.hurry()
    run.wait_state("COMPLETED")
    assert field(slurm, run.job, "ExcNodeList") == "n0" and " n0 " not in run.log()


def test_a_bad_node_that_the_job_cannot_do_without_may_come_back(slurm, tmp_path):
    """Five of five nodes are needed: with one excluded, the job would wait for ever."""
    run = Run(
        slurm, tmp_path / "r", "cluster.nodes=5", "train.global_batch_rows=20",
        'cluster.health.command="test $SLURMD_NODENAME != n0 || test x$SLURM_RESTART_COUNT = x1"',
    )  # fmt: skip
    run.wait_output("bad, but allowed")
    run.hurry()
    run.wait_state("COMPLETED")
    assert "n0" in run.records("bad_nodes.json") and " n0 " in run.log()


def test_nodes_that_the_user_excludes_stay_excluded(slurm, tmp_path):
    run = Run(
        slurm, tmp_path / "r", "cluster.directives=['--exclude=n2']",
        "cluster.health.command='test $SLURMD_NODENAME != n0'",
    )  # fmt: skip
    wait_for(lambda: (run.folder / "slurm" / "bad_nodes.json").exists())
    run.hurry()
    run.wait_state("COMPLETED")
    assert set(run.field("ExcNodeList").split(",")) == {"n0", "n2"}
    assert not {"n0", "n2"} & set(run.events("launching")[-1]["nodes"])


def test_ranks_follow_the_order_of_a_host_file(slurm, tmp_path):
    """A site's topology order: here the reverse of Slurm's, with a sick node in the middle."""
    order = tmp_path / "order"
    setup = f"scontrol show hostnames $SLURM_JOB_NODELIST | sort -r >{order}"
    run = Run(
        slurm, tmp_path / "r", f"cluster.setup=['{setup}', 'export SLURM_HOSTFILE={order}']",
        "cluster.tasks_per_node=2", "cluster.survival.spare_nodes=1", "train.global_batch_rows=16",
        "cluster.health.command='test $SLURMD_NODENAME != n1'",
    )  # fmt: skip
    run.wait_state("COMPLETED")
    assert order.read_text().split() == ["n2", "n1", "n0"]
    places = {line.split()[3]: line.split()[1] for line in run.log().splitlines()}
    assert places == {"0/4": "n2", "1/4": "n2", "2/4": "n0", "3/4": "n0"}
    found = json.loads((run.folder / "environment.json").read_text())
    assert found["MASTER_ADDR"] == "n2"


def test_a_sweep_runs_as_an_array(slurm, tmp_path):
    run = Run(
        slurm, tmp_path / "sweep of 2", "cluster.nodes=1", "--sweep", "train.seed=1",
        "--sweep", "train.seed=2", "--throttle", "1",
    )  # fmt: skip
    assert "ArrayTaskThrottle=1 " in slurm.run("scontrol", "show", "job", "-o", run.job).stdout
    wait_for(
        lambda: all(
            "finished" in log.read_text() if log.exists() else False
            for log in (run.folder / "0/trainer.log", run.folder / "1/trainer.log")
        )
    )


def test_a_scaling_study_runs_as_an_array_with_the_real_trainer(slurm, data, tmp_path):
    """Two cells of the laptop study cut down to a second each."""
    (tmp_path / "base.yaml").write_text(
        f"data:\n  sources: [{{path: {data}/train}}]\n"
        f"  validation: {{text: {data}/validation}}\n"
        "train: {sequence_length: 16, global_batch_rows: 4, micro_batch_rows: 4}\n"
        "precision: {dtype: fp32}\n"
    )
    for width in (16, 32):
        (tmp_path / f"w{width}.yaml").write_text(
            f"model: {{hidden_size: {width}, num_layers: 1, num_heads: 2, vocab_size: 280}}\n"
        )
    (tmp_path / "it's a sweep.yaml").write_text(
        f"name: two\nfolder: {tmp_path}/two\nbase: base.yaml\nmodels: [w16.yaml, w32.yaml]\n"
        "objectives: [{name: ar}]\nbudgets: [2.0e+7]\nhardware: cpu\nnum_gpus: 1\n"
    )
    sweep = tmp_path / "it's a sweep.yaml"
    command("sweep", "run", sweep, "--slurm", "--throttle", 1, "--sbatch=--mem=500M",
            f"--sbatch=--export=ALL,PYTHONPATH={ROOT}", cwd=tmp_path)  # fmt: skip
    wait_for(lambda: command("sweep", "status", sweep).stdout.count("finished") == 2)


def test_a_folder_that_the_nodes_do_not_see_is_suspected_by_status(slurm, tmp_path):
    hidden = tmp_path / "here only"
    hidden.mkdir()
    # Mounted after the nodes got their own view of the file systems.
    if slurm.run("mount", "-t", "tmpfs", "none", hidden, check=False).returncode:
        pytest.skip("NO MOUNT HERE: a folder cannot be hidden from the nodes")
    try:
        run = Run(slurm, hidden / "r", f"cluster.shared_folders=['{hidden}']")
        run.wait_state("FAILED")
        assert "do the nodes see this folder?" in command("status", run.folder).stdout
    finally:
        slurm.run("umount", hidden)


@pytest.mark.parametrize(
    "settings, words",
    [
        (["cluster.partition=nowhere"], "this cluster has grace, high, main"),
        (["cluster.nodes=6"], "no set of nodes|more nodes"),
        (["cluster.partition=main", "cluster.gpus_per_node=9"], "at most 8"),
        (["cluster.shared_folders=[/shared]"], "not on a file system"),
        (["train.global_batch_rows=7"], "global_batch_rows"),
    ],
)
def test_an_impossible_request_leaves_nothing_behind(slurm, tmp_path, settings, words):
    folder = tmp_path / "r"
    done = command(
        "submit", "configs/run/quickstart.yaml", "--cluster", "local", f"folder={folder}",
        f"cluster.shared_folders=['{tmp_path}']", "train.global_batch_rows=16",
        "train.micro_batch_rows=2", *settings, check=False,
    )  # fmt: skip
    assert done.returncode in (2, 6) and re.search(words, done.stderr), done.stderr
    assert not folder.exists() and slurm.run("squeue", "-h").stdout == ""
