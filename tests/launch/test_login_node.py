"""Commands of the login node: how often they ask Slurm, that they need no torch, and what they refuse.

Slurm is a folder of small programs that answer what was recorded and note that they were asked.
"""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from megatron_eso.config import load_config
from megatron_eso.data.manifest import Manifest
from megatron_eso.errors import ClusterError
from megatron_eso.launch import control, lease, slurm
from megatron_eso.launch.records import Records

ROOT = Path(__file__).parents[2]
NO_TORCH = (
    "import sys\n"
    "for name in ('torch', 'megatron', 'tokenizers'): sys.modules[name] = None\n"
    "from megatron_eso.cli.main import main\n"
    "sys.argv = ['megatron-eso', *sys.argv[1:]]\n"
    "main()\n"
)
CHAIN = "cluster.survival.requeue=chain"
RUN = [
    "configs/run/quickstart.yaml", "train.global_batch_rows=64", "train.micro_batch_rows=2",
    # Not what `make pretrain` may have left in this folder.
    "data.sources=[{path: runs/none/train}]", "data.validation.stdlib=runs/none/validation",
]  # fmt: skip


class LoginNode:
    """A PATH whose only Slurm is ours."""

    def __init__(self, folder):
        self.bin, self.calls = folder / "bin", folder / "calls"
        self.bin.mkdir()
        self.calls.touch()
        self.environment = {
            **os.environ,
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "PYTHONPATH": str(ROOT),
        }
        for name in ("squeue", "sinfo", "sbatch", "scontrol", "sacct"):
            self.answers(name)

    def answers(self, name, text="", *, code=0, real_submit=None):
        """Let a program print a text; ``real_submit`` is what sbatch says without --test-only."""
        (self.bin / f"{name}.text").write_text(text)
        (self.bin / f"{name}.real").write_text(real_submit or text)
        refuses = 1 if real_submit else code
        program = self.bin / name
        program.write_text(
            f'#!/bin/sh\necho "{name} $*" >>{self.calls}\ncase "$*" in *--test-only*)\n'
            f"cat {self.bin}/{name}.text >&{1 + bool(code)}; exit {code};; esac\n"
            f"cat {self.bin}/{name}.real >&{1 + bool(refuses)}; exit {refuses}\n"
        )
        program.chmod(0o755)

    def run(self, *words, code=0, cwd=ROOT):
        done = subprocess.run(
            [sys.executable, "-c", NO_TORCH, *map(str, words)], cwd=cwd, env=self.environment,
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, *words, code=0):
        """Submit into DIR/r, which the nodes are said to see (a temporary folder may be a tmpfs)."""
        folder = self.bin.parent
        shared = [f"folder={folder}/r", f"cluster.shared_folders=['{folder}']"]
        return self.run("submit", *RUN, *shared, *words, code=code)

    def asked(self):
        """Return the names of the programs that were called."""
        return [line.split()[0] for line in self.calls.read_text().splitlines()]


@pytest.fixture
def node(tmp_path):
    node = LoginNode(tmp_path)
    node.answers("sinfo", "main|up|4|idle|gpu:h100:8|infinite|208|1000000\n")
    return node


def make_runs(folder, number):
    """Return squeue's lines for runs that are half done."""
    lines = []
    for i in range(number):
        run = folder / f"run{i}"
        run.mkdir(parents=True)
        status = {"state": "running", "step": 50, "total_steps": 100, "updated": time.time()}
        (run / "status.json").write_text(json.dumps(status))
        (run / "metrics.jsonl").write_text('{"step": 50, "loss": 2.5}\n' * 500)
        lines.append(f"{i}|RUNNING|None|n{i}|1:00|2026-11-26T06:00:00|megatron-eso|{run}\n")
    return "".join(lines)


def test_status_of_a_hundred_runs_asks_slurm_once(node, tmp_path):
    node.answers("squeue", make_runs(tmp_path, 100))
    said = node.run("status")
    assert len(said.splitlines()) == 100 and said.count("step 50/100  loss 2.5000") == 100
    assert node.asked() == ["squeue"]


def test_status_of_a_run_tells_what_its_folder_says_where_slurm_cannot_be_asked(node, tmp_path):
    """A laptop, or a login node whose controller does not answer; the folder may be another user's."""
    make_runs(tmp_path, 2)
    run = tmp_path / "run0"
    (run / "checkpoints" / "step_0000000040").mkdir(parents=True)
    (run / "checkpoints" / "step_0000000040" / "COMMITTED").touch()
    times = [(1000.0, "setup", {}), (1010.0, "ready", {"step": 0}), (1110.0, "stop", {"step": 50})]
    lines = [dict(event=e, time=t, clock=t, boot="b", pid=1, **more) for t, e, more in times]
    (run / "events.jsonl").write_text("\n".join(map(json.dumps, lines)))
    status = json.loads((run / "status.json").read_text())
    status |= {"state": "failed", "reason": "loss is nan\nin step 51"}
    (run / "status.json").write_text(json.dumps(status))
    Records(tmp_path / "run1").set_submission(job="7")
    node.answers("squeue", "Unable to contact slurm controller\n", code=1)
    said = node.run("status", run)
    assert "Slurm could not be asked: Slurm's controller does not answer" in said
    (node.bin / "squeue").unlink()
    node.environment["PATH"] = str(node.bin)
    said = node.run("status", run)
    for words in (
        "Slurm could not be asked: squeue is not on PATH", "step 50/100  loss 2.5000", "saved     step 40",
        "state failed: loss is nan", "effective training time  90.9% of", "starts 1, faults 0",
    ):  # fmt: skip
        assert words in said
    assert not (run / "slurm").exists()
    said = node.run("status", tmp_path / "run1")
    assert "job       7: Slurm could not be asked" in said and "has left the queue" not in said
    said = node.run("status", run, tmp_path / "run1")
    assert said.count("step 50/100") == 2 and said.count("Slurm could not be asked") == 1
    assert "squeue is not on PATH" in node.run("status", code=6)  # all of my jobs
    assert node.asked() == ["squeue"]


def test_a_job_of_anothers_in_the_folder_of_a_run_is_not_the_runs(node, tmp_path):
    """An interactive one, say, that was started there."""
    run = tmp_path / "run0"
    mine = make_runs(tmp_path, 1).replace("0|", "8|", 1)
    other = f"9|RUNNING|None|n9|1:00|N/A|(null)|{run}\n"
    node.answers("squeue", mine + other)
    assert "8 RUNNING on n0" in node.run("status", run)
    node.answers("squeue", other)
    assert "9 RUNNING" not in node.run("status", run)
    assert node.run("status").startswith("you have no jobs")


def test_status_of_named_runs_asks_slurm_once(node, tmp_path):
    node.answers("squeue", make_runs(tmp_path, 5))
    said = node.run("status", *(tmp_path / f"run{i}" for i in range(5)))
    assert said.count("RUNNING") == 5
    assert node.asked() == ["squeue"]


def test_status_names_the_nodes_that_a_waiting_job_lacks_and_why(node, tmp_path):
    line = make_runs(tmp_path, 1).replace("RUNNING|None|n0", "PENDING|{0}|({0})")
    for reason, words in (
        (
            "Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions",
            "too few of the nodes it may have are in service",
        ),
        (
            "ReqNodeNotAvail, UnavailableNodes:n[0-1],n4",
            "down, drained or reserved for maintenance",
        ),
    ):
        node.answers("squeue", line.format(reason))
        node.answers(
            "sinfo",
            "2|n[0-1]|down~|ResumeTimeout reached\n1|n3|idle|none\n1|n4|drained|Prolog error\n"
            "2|n[0-1]|down~|ResumeTimeout reached\n",
        )
        said = node.run("status", tmp_path / "run0")
        assert words in said
        assert said.count("2 nodes are down~: n[0-1] (ResumeTimeout reached)") == 1
        assert "1 node is drained: n4 (Prolog error)" in said and "n3" not in said


def test_submit_leaves_a_run_folder_and_says_what_to_do_next(node, tmp_path):
    node.answers("sbatch", "7\n")
    said = node.submit("--cluster", "generic", "--nodes", "1")
    assert "job 7 submitted" in said and f"next: megatron-eso status {tmp_path}/r" in said
    assert Records(tmp_path / "r").submission()["job"] == "7"
    assert {"code", "commit.txt", "config.yaml", "job.sbatch", "profile.yaml"} <= set(
        os.listdir(tmp_path / "r/slurm")
    )
    assert node.asked() == ["squeue", "sinfo", "sbatch", "squeue", "sbatch"]


def test_a_run_that_is_submitted_again_leaves_out_its_bad_nodes_beside_the_users_own(
    node, tmp_path
):
    node.answers("sbatch", "7\n")
    node.answers("scontrol", "n3\n")
    records = Records(tmp_path / "r")
    records.add_bad_nodes({"n1": "down"}, hours=1)
    own = "cluster.directives=['--exclude=n3']"
    assert "no set" not in node.submit("--cluster", "generic", "--nodes", "1", own)
    assert "--exclude=n3,n1" in node.calls.read_text()
    assert records.state()["exclude"] == "n3"


def test_a_container_sees_the_data(node, tmp_path):
    data = "data.sources=[{path: /lustre/web/train}]"
    script = node.submit("--cluster", "generic-container", "--nodes", "1", data, "--dry-run")
    assert "MOUNTS=(/lustre/web:/lustre/web)" in script
    local = "checkpoint.local_folder=/ssd"
    assert "cluster.container.mounts" in node.submit(
        "--cluster", "generic-container", "--nodes", "1", local, "--dry-run", code=6
    )


def array(tmp_path, node):
    """A run folder of an array of four tasks, of which one runs."""
    run = tmp_path / "arr"
    Records(run).set_submission(job="12", num_tasks=4)
    for task in range(4):
        Records(run / str(task)).set_submission(job=f"12_{task}")
    more = f"|None|n1|1:00|N/A|megatron-eso|{run}"
    node.answers("squeue", f"12_[1-3]|PENDING{more}\n12_0|RUNNING{more}\n")
    node.answers("scancel")
    return run


def test_an_array_saves_ends_and_begins_no_further_task(node, tmp_path):
    run = array(tmp_path, node)
    assert "job 12_0 saves a checkpoint and ends" in node.run("cancel", run, "--after-checkpoint")
    assert all(Records(run / name).is_stop_asked() for name in ("", "0", "1", "2", "3"))
    calls = node.calls.read_text().splitlines()
    assert calls[-2:] == ["scancel 12_[1-3]", "scancel --batch --signal=USR1 12_0"]


@pytest.mark.parametrize("command", ["cancel", "requeue"])
def test_of_a_run_without_a_job_it_is_said_where_it_runs_and_how_it_is_stopped(
    node, tmp_path, command
):
    make_runs(tmp_path, 1)
    run, checkpoints = tmp_path / "run0", tmp_path / "run0" / "checkpoints"
    pid = os.getpid()
    for owner, host, process in (
        (lease.owner_name({}), platform.node(), pid),
        (lease.owner_name({"SLURM_JOB_ID": "17"}), platform.node(), pid),  # a script of the user's
        ("n7/5/99", "n7", 5),
    ):
        lease.acquire(checkpoints, owner)
        said = node.run(command, run, code=6)
        assert f"{run} was not submitted to Slurm" in said
        assert f"on {host} as process {process}: `kill {process}` there" in said
        lease.release(checkpoints, owner)
    lease.acquire(checkpoints, f"{platform.node()}/{pid}/1")  # a number that is used again
    assert "no process is known to run it (status.json: running, step 50)" in node.run(
        command, run, code=6
    )
    assert node.asked() == []


@pytest.mark.parametrize(
    ("place", "words"),
    [("", "holds no run"), ("none", "is not a folder"), ("file", "is not a folder")],
    ids=["another-folder", "none", "a-file"],
)
def test_what_is_no_run_folder_is_called_so(node, tmp_path, place, words):
    (tmp_path / "file").touch()
    assert f"{tmp_path / place} {words}" in node.run("cancel", tmp_path / place, code=6)


def test_one_task_of_an_array_can_be_cancelled(node, tmp_path):
    run = array(tmp_path, node)
    node.answers("squeue", f"12_0|RUNNING|None|n1|1:00|N/A|megatron-eso|{run}\n")
    node.run("cancel", run / "0", "--after-checkpoint")
    assert Records(run / "0").is_stop_asked() and not Records(run).is_stop_asked()


def test_status_and_logs_of_an_array_are_its_tasks(node, tmp_path):
    run = array(tmp_path, node)
    lines = node.run("status", run).splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["0", "12_0", "RUNNING"], *([str(task), "12_[1-3]", "PENDING"] for task in (1, 2, 3)),
    ]  # fmt: skip
    (run / "2/slurm-12_2.out").write_text("words of task 2\n")
    assert "words of task 2" in node.run("logs", run)


def test_a_requeue_that_is_refused_takes_no_wish_to_stop_back(node, tmp_path):
    run = array(tmp_path, node)
    Records(run).ask_to_stop()
    node.answers("scontrol", "JobId=12 JobState=RUNNING Priority=7\n")
    assert "is RUNNING and not held" in node.run("requeue", run, code=6)
    assert Records(run).is_stop_asked()
    held = "ArrayJobId=12 ArrayTaskId={} JobState={} Priority={}\n"
    node.answers("scontrol", "JobId=15 " + held.format(0, "RUNNING", 7)
                 + "JobId=12 " + held.format(3, "PENDING", 0))  # fmt: skip
    assert "job 12_3 released" in node.run("requeue", run)
    assert not Records(run).is_stop_asked()
    assert node.calls.read_text().splitlines()[-1] == "scontrol release 12_3"


def test_a_run_in_the_folder_of_an_earlier_array_has_a_count_of_its_own(node, tmp_path):
    run = array(tmp_path, node)
    Records(run).set_submission(job="13", num_tasks=0)
    Records(run).set_state(without_progress=3)
    node.answers("scontrol", "JobId=13 JobState=PENDING Priority=0\n")
    assert "job 13 released" in node.run("requeue", run)
    assert Records(run).state()["without_progress"] == 0


def test_the_tasks_of_an_earlier_array_keep_their_jobs(node, tmp_path):
    for task in ("0", "1"):
        Records(tmp_path / "r" / task).set_submission(job=f"3_{task}")
    node.answers("sbatch", "7\n")
    node.submit("--sweep", "train.seed=1")
    jobs = [Records(tmp_path / "r" / task).submission()["job"] for task in ("0", "1")]
    assert jobs == ["7_0", "3_1"]


def test_of_a_folder_that_held_an_array_its_own_run_is_shown(node, tmp_path):
    run = tmp_path / "r"
    for task in ("0", "1"):
        Records(run / task).set_submission(job=f"3_{task}")
        (run / task / f"slurm-3_{task}.out").write_text(f"words of task {task}\n")
    node.answers("sbatch", "7\n")
    node.submit("--cluster", "generic")
    node.answers("squeue", f"7|RUNNING|None|n1|1:00|N/A|megatron-eso|{run}\n")
    said = node.run("status", run)
    assert f"run       {run}\n" in said and "job       7" in said
    (run / "slurm-7.out").write_text("words of the run\n")
    assert node.run("logs", run).endswith("words of the run\n")


def test_watch_lives_through_what_slurm_refuses(node, tmp_path):
    more = f"|BeginTime|n1|1:00|N/A|megatron-eso|{tmp_path}"
    node.answers("squeue", f"7|PENDING{more}\n8|PENDING{more}\n")
    node.answers("scontrol", "Job is no longer pending execution\n", code=1)
    said = node.run("watch", "--once")
    assert "job 7:" in said and "job 8:" in said


def test_watch_says_why_there_is_nothing_to_watch(node, tmp_path):
    """It ended without a word, or asked a Slurm that is not there again and again."""
    assert "no such run folder: nowhere" in node.run("watch", "nowhere", code=6)
    assert "no job is in the queue" in node.run("watch")
    node.answers("squeue", "7|RUNNING|None|n1|1:00|N/A|megatron-eso|/other\n")
    assert "none of these runs has a job in the queue" in node.run("watch", tmp_path)
    for program in node.bin.iterdir():
        program.unlink()
    node.environment["PATH"] = str(node.bin)
    assert "squeue is not on PATH" in node.run("watch", tmp_path, code=6)


def test_watch_says_once_that_slurm_does_not_answer(monkeypatch):
    job = slurm.QueuedJob("7", "RUNNING", "", "n1", "1:00", "", "megatron-eso", "/r")
    answers = iter([ClusterError("down"), ClusterError("down"), [job], ClusterError("down"), []])

    def queue():
        answer = next(answers)
        if isinstance(answer, ClusterError):
            raise answer
        return answer

    monkeypatch.setattr(slurm, "queue", queue)
    monkeypatch.setattr(slurm, "require_program", lambda name: None)
    said = []
    control.watch(None, every_seconds=0.01, once=False, say=said.append)
    assert said == [*2 * ["looking again every 0.01 s: down"], "no job is in the queue"]


def test_a_new_start_is_refused_where_checkpoints_are_and_later_attempts_go_on(node, tmp_path):
    node.answers("sbatch", "7\n")
    words = ("--cluster", "generic", "--nodes", "1", "checkpoint.resume=never")
    node.submit(*words)
    assert "resume: auto" in (tmp_path / "r/slurm/config.yaml").read_text()
    (tmp_path / "r/checkpoints/step_0000000005").mkdir(parents=True)
    assert "checkpoint.resume=never" in node.submit(*words, code=6)


POLICY = (
    "sbatch: error: AssocMaxSubmitJobLimit\nsbatch: error: Batch job submission failed: Job violates "
    "accounting/QOS policy (job submit limit, user's size and/or time limits)"
)


def test_a_refusal_at_the_last_moment_leaves_nothing_half_submitted(node, tmp_path):
    node.answers("sbatch", "sbatch: Job 7 to start\n", real_submit=POLICY)
    said = node.submit("--cluster", "generic", code=6)
    assert "a limit of the account or QOS is reached" in said and POLICY in said
    assert not (tmp_path / "r").exists()
    (tmp_path / "r").mkdir()  # a folder that was there stays, and can be submitted from again
    node.submit("--cluster", "generic", code=6)
    assert (tmp_path / "r").is_dir() and not (tmp_path / "r/slurm/job.json").exists()
    node.answers("sbatch", "8\n")
    assert "job 8" in node.submit("--cluster", "generic")


def test_an_account_that_does_not_exist_is_slurms_word_in_ours(node, tmp_path):
    said = "allocation failure: Invalid account or account/partition combination specified"
    node.answers("sbatch", said, code=1)
    text = node.submit("cluster.account=nobody", code=6)
    assert "set account= and partition=" in text and said in text
    assert not (tmp_path / "r").exists()


def test_without_slurm_nothing_is_left_and_the_message_names_the_dry_run(node, tmp_path):
    for program in node.bin.iterdir():
        program.unlink()
    node.environment["PATH"] = str(node.bin)
    said = node.submit(code=6)
    assert "not on PATH" in said and "--dry-run" in said and not (tmp_path / "r").exists()
    assert "#SBATCH --nodes=1" in node.submit("--dry-run")


def test_a_limit_that_leaves_no_time_for_a_checkpoint_is_refused_with_the_numbers(node, tmp_path):
    said = node.submit("cluster.checkpoint_gb_per_second=0.00001", "--test-only", code=6)
    assert "signal_seconds=600" in said and "checkpoint_gb_per_second=1e-05" in said
    said = node.submit("cluster.time_limit=10", code=6)
    assert "leaves no time to train" in said
    assert node.asked() == []


def test_the_step_under_way_counts_beside_the_checkpoint(node):
    slow = [
        "train.sequence_length=65536",
        "model.max_length=65536",
        "train.global_batch_rows=131072",
    ]
    said = node.submit(*slow, "--cluster", "gcp-a3-mega", "--test-only", code=6)
    assert re.search(r"the step under way \d{3,} s and a checkpoint of [\d.]+ GB takes \d+ s", said)
    assert "raise signal_seconds" in said and node.asked() == []


def test_a_model_that_does_not_fit_is_refused_by_the_planner(node, tmp_path):
    big = ["model.hidden_size=16384", "model.num_layers=80", "model.num_heads=128"]
    said = node.submit(
        *big, "--cluster", "gcp-a3-mega", "cluster.checkpoint_gb_per_second=1000", code=6
    )
    assert "GB of 80 GB" in said and "parallel.tensor" in said and "cluster.hardware=''" in said
    assert not (tmp_path / "r").exists() and node.asked() == []


def test_a_folder_on_this_machines_memory_is_refused(node):
    said = node.run("submit", *RUN, "folder=/dev/shm/run", code=6)
    assert "/dev/shm/run is on a tmpfs" in said and "shared_folders" in said
    assert not Path("/dev/shm/run").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--nodes", "0"], "nodes=0 must be at least 1"),
        (["--throttle", "-1"], "--throttle -1 must not be negative"),
        (["--throttle", "2"], "--throttle 2 limits the tasks of an array"),
        (["--throttle", "2", "--sweep", "train.seed=1", CHAIN], f"{CHAIN} each task"),
        (["--sweep", "name=it's"], "--sweep name=it's: No closing quotation"),
    ],
)
def test_options_of_submit_that_cannot_be_meant_are_refused(node, tmp_path, words, message):
    code = 2 if "name=it's" in words else 6
    assert message in node.submit(*words, code=code)
    assert node.asked() == [] and not (tmp_path / "r").exists()


def test_a_pause_that_cannot_be_slept_is_refused(node):
    assert "Invalid value for '--every'" in node.run("watch", "--every", "-1", code=2)
    assert node.asked() == []


def test_a_file_in_place_of_a_checkpoint_is_called_a_file(node, tmp_path):
    (tmp_path / "f").touch()
    assert "f is a file; give a" in node.run("checkpoint", "inspect", tmp_path / "f", code=4)
    assert "does not exist" in node.run("checkpoint", "inspect", tmp_path / "g", code=4)
    assert "does not exist" in node.run("checkpoint", "list", tmp_path / "g", code=4)


@pytest.mark.parametrize("option, number", [("num_samples", -1), ("num_samples", 0), ("length", 0)])
def test_a_number_of_samples_or_tokens_below_one_is_refused(tmp_path, option, number):
    from megatron_eso.cli.sample import sample
    from megatron_eso.errors import ConfigError

    with pytest.raises(ConfigError, match=f"--{option.replace('_', '-')} {number} must be at"):
        sample(tmp_path, **{option: number})


@pytest.mark.parametrize(
    "words, message",
    [
        (["sample", "r", "--alpha-0", "2"], "--alpha-0 2.0 must be in [0, 1]"),
        (["sample", "r", "--plan", "best"], "--plan best is not one of auto, binomial"),
        (["sample", "r", "--ranks", "2"], "1 ranks are needed, but --ranks is 2: set --ranks 1"),
        (["eval", "r", "data", "--batch", "0"], "--batch 0 must be at least 1"),
    ],
)
def test_wrong_numbers_are_refused_before_torch_is_imported(node, words, message):
    """Its import takes seconds, and the ranks import it for themselves."""
    assert message in node.run(*words, code=2)


def test_a_world_size_that_is_no_number_is_a_message_of_sample_too(node):
    node.environment |= {"RANK": "0", "WORLD_SIZE": "x"}
    said = node.run("sample", "r", code=2)
    assert "WORLD_SIZE=x in the environment is not a number" in said
    node.environment["WORLD_SIZE"] = "2"
    assert "the launcher started 2 (WORLD_SIZE): let it start 1" in node.run("sample", "r", code=2)


def split(folder, **facts):
    """Write what a prepared split says of itself, without rows."""
    known = {field.name: 1 for field in fields(Manifest) if field.default is MISSING}
    known |= {"split": "train", "dtype": "uint16", "tokenizer_sha256": "a", "index_sha256": "b"}
    folder.mkdir(parents=True)
    Manifest(**{**known, "tokenizer_file": "t.json", **facts}).save(folder)
    return f"data.sources=[{{path: {folder}}}]"


def test_submit_compares_the_data_it_sees_with_the_run(node, tmp_path):
    fitting = split(tmp_path / "fits", sequence_length=128, vocab_size=2048)
    said = node.submit(fitting, "data.validation={v: /no/such}", "--dry-run")
    assert "not checked: data.validation.v=/no/such (not on this machine)" in said
    assert "data.sources[0].path" not in said
    other = split(tmp_path / "other", sequence_length=256, vocab_size=2048)
    said = node.submit(other, code=3)
    assert "rows of 256 tokens, but the run asks for train.sequence_length=128" in said
    said = node.submit(
        fitting, "--sweep", "train.seed=1", "--sweep", "model.vocab_size=4096", code=3
    )
    assert "model.vocab_size=4096" in said
    assert node.asked() == [] and not (tmp_path / "r").exists()


def test_the_tasks_of_an_array_are_told_a_folder_that_holds_an_interpolation(node, tmp_path):
    folder = tmp_path / "a${name}'s"
    words = [f"folder='{tmp_path}/a\\${{name}}''s'", f"cluster.shared_folders=['{tmp_path}']"]
    node.answers("sbatch", "7\n")
    node.run("submit", *RUN, *words, "--sweep", "train.seed=1")
    script = (folder / "slurm/job.sbatch").read_text()
    [line] = [line for line in script.splitlines() if "train.seed=1" in line]
    [task] = shlex.split(
        line.removeprefix("SWEEP=(").removesuffix(")")
    )  # as bash reads it, and eval
    given = next(word for word in shlex.split(task) if word.startswith("folder="))
    assert load_config(folder / "slurm/config.yaml", [given]).folder == str(folder / "0")
    assert load_config(folder / "slurm/config.yaml").folder == str(folder)


def test_the_log_of_a_run_that_was_not_submitted_is_its_own(node, tmp_path):
    run = tmp_path / "run"
    assert f"{run} is not a folder" in node.run("logs", run, code=6)
    run.mkdir()
    said = node.run("logs", run, code=6)
    assert "holds no run" in said and "status" not in said
    (run / "log.txt").write_text("step 1\nstep 2\n")
    said = node.run("logs", "-n", "1", run)
    assert "was not submitted" in said and "step 2" in said and "step 1" not in said
    Records(run).set_submission(job="7")
    assert f"`megatron-eso status {run}` says why" in node.run("logs", run, code=6)
