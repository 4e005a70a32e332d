"""What the job does about everything that can happen to it, on a real cluster.

The trainer is the stand-in with the trainer's contract (stand_in/trainer.py); the batch script,
its helpers, sbatch, srun and the signals are real.
"""

import json
import sys
import time

import pytest

from tests.slurm_cluster.conftest import ROOT, STAND_IN, command, field, state, wait_for


class Run:
    """A submitted run."""

    def __init__(self, slurm, folder, *settings, fault=None, wait=True):
        self.slurm, self.folder = slurm, folder
        folder.mkdir(parents=True, exist_ok=True)
        if fault:
            (folder / "fault.json").write_text(json.dumps(fault))
        out = command(
            "submit", "configs/run/quickstart.yaml", "--cluster", "local",
            "folder='" + str(folder).replace("'", "''") + "'",
            f"cluster.python={STAND_IN}/python.sh", f"cluster.host_python={sys.executable}",
            f"cluster.environment.STAND_IN_PYTHON={sys.executable}", "train.global_batch_rows=16",
            "train.micro_batch_rows=2",
            *settings,
        ).stdout  # fmt: skip
        self.job = out.split()[1]

    def log(self):
        file = self.folder / "trainer.log"
        return file.read_text() if file.exists() else ""

    def output(self):
        return "".join(p.read_text() for p in self.folder.glob("slurm-*.out"))

    def wait_log(self, text, timeout=60):
        try:
            wait_for(lambda: text in self.log(), timeout)
        except AssertionError:
            raise AssertionError(f"no {text!r} in:\n{self.log()}\n{self.output()}") from None

    def wait_state(self, *states, timeout=90):
        try:
            wait_for(lambda: state(self.slurm, self.job) in states, timeout)
        except AssertionError:
            text = f"{state(self.slurm, self.job)}\n{self.log()}\n{self.output()}"
            raise AssertionError(f"not {states} but {text}") from None

    def hurry(self):
        """Skip the credential wait of a requeued job."""
        wait_for(lambda: field(self.slurm, self.job, "Reason") == "BeginTime", 60)
        assert "without waiting" in command("watch", "--once", self.folder).stdout

    def records(self, name):
        return json.loads((self.folder / "slurm" / name).read_text())


def test_a_run_with_a_hostile_name_finishes(slurm, tmp_path):
    run = Run(slurm, tmp_path / 'it\'s a $(run); "x"', 'name="a b"')
    run.wait_state("COMPLETED")
    assert "rank 0/2 start at 0" in run.log() and "rank 1/2 start at 0" in run.log()
    assert "finished at 20" in run.log()
    nodes = {line.split()[1] for line in run.log().splitlines()}
    assert len(nodes) == 2
    assert (run.folder / "slurm" / "code" / "megatron_eso").is_dir()


def test_the_walltime_signal_saves_requeues_and_finishes(slurm, tmp_path):
    run = Run(slurm, tmp_path / "r", fault={"steps": 60})
    run.wait_log("rank 0/2 start at 0")
    # What Slurm sends before the limit (--signal=B:USR1), at a moment of our choosing.
    slurm.run("scancel", "--batch", "--signal=USR1", run.job)
    run.wait_log("on SIGUSR1")
    run.hurry()
    run.wait_state("COMPLETED")
    log = run.log()
    assert f"{run.job}.1" in log and "finished at 60" in log
    saved = int(log.split("saved at ")[1].split()[0])
    assert f"{run.job}.1 " in log and f"start at {saved}\n" in log and saved > 0


def test_preemption_without_grace_is_requeued_by_slurm(slurm, tmp_path):
    run = Run(slurm, tmp_path / "r", fault={"steps": 60})
    run.wait_log("rank 0/2 start at 0")
    slurm.run("sbatch", "-p", "high", "-N3", "--exclusive", "-o", tmp_path / "hi", "--wrap", "true")
    wait_for(lambda: field(slurm, run.job, "Restarts") == "1", 60)
    run.wait_state("COMPLETED", timeout=120)
    assert "finished at 60" in run.log()


def test_preemption_with_grace_is_requeued_by_the_script(slurm, tmp_path):
    """A trainer that saves and exits inside the grace is not requeued by Slurm."""
    run = Run(slurm, tmp_path / "r", "cluster.partition=grace", fault={"steps": 60})
    run.wait_log("rank 0/2 start at 0")
    slurm.run("sbatch", "-p", "high", "-N3", "--exclusive", "-o", tmp_path / "hi", "--wrap", "true")
    run.wait_log("on SIGTERM")
    run.wait_state("COMPLETED", timeout=120)
    assert "finished at 60" in run.log()
    assert "decision: requeue" in run.output()


def test_a_cancelled_job_stays_cancelled(slurm, tmp_path):
    run = Run(slurm, tmp_path / "r", fault={"steps": 600})
    run.wait_log("rank 0/2 start at 0")
    slurm.run("scancel", run.job)
    run.wait_state("CANCELLED")
    time.sleep(6)
    assert state(slurm, run.job) == "CANCELLED" and field(slurm, run.job, "Restarts") == "0"


def test_a_killed_node_is_remembered_and_the_run_finishes_elsewhere(slurm, tmp_path):
    run = Run(slurm, tmp_path / "r", fault={"steps": 50})
    run.wait_log("rank 1/2 start at 0")
    bad = run.log().split(" rank 1/2")[0].split()[-1]
    slurm.kill_node(bad)
    run.wait_state("COMPLETED", timeout=120)
    assert "finished at 50" in run.log()
    assert run.records("bad_nodes.json")[bad]["reason"].startswith("Slurm says down")
    final = [line for line in run.log().splitlines() if "finished" in line or "start" in line][-3:]
    assert bad not in " ".join(final)


def test_a_crash_loop_is_held_and_says_why(slurm, tmp_path):
    crash = {"restart": [0, 1, 2, 3], "rank": 1, "step": 2}
    run = Run(
        slurm, tmp_path / "r", "cluster.survival.max_attempts_without_progress=2",
        fault={"crash": crash, "save_nothing": True},
    )  # fmt: skip
    run.wait_log("CRASH")
    run.hurry()
    wait_for(lambda: (run.folder / "slurm" / "held.json").exists(), 60)
    wait_for(lambda: field(slurm, run.job, "Priority") == "0", 30)
    assert "2 attempts in a row without a new checkpoint" in run.records("held.json")["why"]
    assert run.log().count("CRASH") == 2
    assert "held      2 attempts in a row" in command("status", run.folder).stdout


def test_cancel_after_checkpoint_ends_the_job_and_submit_continues_it(slurm, tmp_path):
    run = Run(slurm, tmp_path / "r", fault={"steps": 60})
    run.wait_log("rank 0/2 start at 0")
    run.wait_log("rank 1/2 start at 0")
    with pytest.raises(AssertionError, match=r"works on .* already"):
        Run(slurm, tmp_path / "r")
    assert "saves a checkpoint" in command("cancel", "--after-checkpoint", run.folder).stdout
    run.wait_state("COMPLETED")
    assert "on SIGUSR1" in run.log() and field(slurm, run.job, "Restarts") == "0"
    again = Run(slurm, tmp_path / "r")
    again.wait_state("COMPLETED")
    saved = int(run.log().split("saved at ")[1].split()[0])
    assert saved > 0 and f"{again.job}.0" in run.log() and f"start at {saved}\n" in run.log()
    assert "finished at 60" in run.log()


def test_a_sick_node_is_left_out_before_step_0(slurm, tmp_path):
    run = Run(
        slurm, tmp_path / "r", "cluster.survival.spare_nodes=1",
        "cluster.health.command='test $SLURMD_NODENAME != n0 || { echo broken link; exit 1; }'",
    )  # fmt: skip
    run.wait_state("COMPLETED")
    assert "broken link" in run.records("bad_nodes.json")["n0"]["reason"]
    assert " n0 " not in run.log() and "finished" in run.log()


def test_too_few_healthy_nodes_requeues_on_others(slurm, tmp_path):
    run = Run(
        slurm, tmp_path / "r",
        "cluster.health.command='test $SLURMD_NODENAME != n0'",
    )  # fmt: skip
    wait_for(lambda: (run.folder / "slurm" / "bad_nodes.json").exists(), 30)
    run.hurry()
    run.wait_state("COMPLETED")
    assert field(slurm, run.job, "ExcNodeList") == "n0" and " n0 " not in run.log()


def test_a_sweep_runs_as_an_array(slurm, tmp_path):
    run = Run(
        slurm, tmp_path / "sweep of 2", "cluster.nodes=1", "--sweep", "train.seed=1",
        "--sweep", "train.seed=2", "--throttle", "1",
    )  # fmt: skip
    wait_for(
        lambda: all(
            "finished" in log.read_text() if log.exists() else False
            for log in (run.folder / "0/trainer.log", run.folder / "1/trainer.log")
        ),
        60,
    )


def test_a_scaling_study_runs_as_an_array_with_the_real_trainer(slurm, tmp_path):
    """Two cells of the laptop study cut down to a second each, on data of their own."""
    text = tmp_path / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(f"document {number} " * 50)
    command("data", "prepare", text, "--out", tmp_path / "data", "--sequence-length", 16,
            "--vocab-size", 280, "--validation-fraction", 0.2)  # fmt: skip
    (tmp_path / "base.yaml").write_text(
        f"data:\n  sources: [{{path: {tmp_path}/data/train}}]\n"
        f"  validation: {{text: {tmp_path}/data/validation}}\n"
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
    wait_for(lambda: command("sweep", "status", sweep).stdout.count("finished") == 2, 120)


@pytest.mark.parametrize(
    "settings, words",
    [
        (["cluster.partition=nowhere"], "this cluster has grace, high, main"),
        (["cluster.nodes=4"], "no set of nodes|more nodes"),
        (["cluster.partition=main", "cluster.gpus_per_node=9"], "at most 8"),
        (["cluster.shared_folders=[/shared]"], "not on a file system"),
        (["train.global_batch_rows=7"], "global_batch_rows"),
    ],
)
def test_an_impossible_request_leaves_nothing_behind(slurm, tmp_path, settings, words):
    import re

    folder = tmp_path / "r"
    done = command("submit", "configs/run/quickstart.yaml", "--cluster", "local",
                   f"folder={folder}", "train.global_batch_rows=16",
            "train.micro_batch_rows=2",
                   *settings, check=False)  # fmt: skip
    assert done.returncode in (2, 6) and re.search(words, done.stderr), done.stderr
    assert not folder.exists() and slurm.run("squeue", "-h").stdout == ""
