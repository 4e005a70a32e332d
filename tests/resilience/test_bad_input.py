"""What a person gets wrong about folders and checkpoints, and small parts without ranks."""

import gc
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_eso.checkpoint import child as child_module
from megatron_eso.checkpoint.child import Child
from megatron_eso.checkpoint.folder import folder_of_step
from megatron_eso.checkpoint.strategy import Plan
from megatron_eso.errors import CheckpointError
from megatron_eso.launch import lease
from megatron_eso.launch.heartbeat import VARIABLE, Board, Heart
from megatron_eso.launch.processes import STOPPING
from tests.resilience.conftest import SETTINGS


@pytest.mark.slow
def test_two_runs_in_one_folder_are_refused_with_the_owners_host_and_pid(faulty):
    root = faulty.folder / "x" / "taken" / "checkpoints"
    lease.acquire(root, lease.owner_name({}))
    out = faulty.run("taken", "train.steps=2", code=4)
    assert f"{platform.node()}/{os.getpid()}/" in out and "runs on this host" in out
    assert not (root.parent / "events.jsonl").exists()  # which counts for the owner's run
    lease.release(root, lease.owner_name({}))


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_refused_before_training(faulty):
    (faulty.folder / "x" / "file").write_text("")
    out = faulty.command("train", "run.yaml", *SETTINGS, "parallel.tensor=1", "train.steps=2",
                         "folder=file/run", code=2)  # fmt: skip
    assert "cannot be written" in out and "Traceback" not in out


@pytest.mark.slow
def test_a_run_whose_lease_is_taken_publishes_nothing_and_ends(faulty):
    """As when a cut-off node lives on: the newer attempt's lease is there when it saves."""
    process = faulty.start("fenced", "train.steps=4000", "train.save_every_steps=40")
    root = faulty.folder / "x" / "fenced" / "checkpoints"
    deadline = time.monotonic() + 300
    while not list(root.glob("step_*/COMMITTED")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    assert len(faulty.processes_of("fenced")) >= 4  # the launcher, its template, two ranks
    (root / lease.LEASE_FILE).write_text(json.dumps({"owner": "77.1", "updated": time.time()}))
    before = {path for path in root.glob("step_*/COMMITTED")}
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 4, out
    assert "lost its lease to 77.1" in out
    after = {path for path in root.glob("step_*/COMMITTED")}
    assert len(after - before) <= 1  # one may have been past the check already
    assert lease.read(root)["owner"] == "77.1"
    faulty.assert_nothing_left("fenced")


def test_a_lease_from_the_future_says_that_clocks_differ(tmp_path):
    lease.acquire(tmp_path, "elsewhere/4/1", now=10_000.0)
    with pytest.raises(CheckpointError, match="clocks differ"):
        lease.acquire(tmp_path, "here/4/1", now=2_000.0)


def test_a_checkpoint_of_a_newer_format_is_refused(tmp_path):
    folder = folder_of_step(tmp_path, 3)
    folder.path.mkdir()
    (folder.path / "esolm.json").write_text(json.dumps({"format_version": 99, "step": 3}))
    with pytest.raises(CheckpointError, match="update megatron-eso"):
        folder.sidecar()


def test_the_limit_of_a_section_follows_the_longest_so_far(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    heart = Heart({}, setup_seconds=600, floor_seconds=30, factor=3)
    assert heart.limit("step") == 600  # never timed
    assert Heart({}, setup_seconds=10, floor_seconds=30, factor=3).limit("step") == 30
    now[0] += 1
    heart.enter("step")
    assert heart.limit("setup") == 600
    now[0] += 100
    heart.enter("step")  # the first step builds what others reuse: a bound until one is timed
    assert heart.limit("step") == 300
    for seconds in (2, 20, 4):
        now[0] += seconds
        heart.enter("step")
    heart.enter("evaluation")
    assert heart.limit("step") == 60
    now[0] += 5
    heart.enter("step")
    assert heart.limit("evaluation") == 30


def test_the_launcher_reads_what_a_rank_writes():
    board = Board()
    assert board.read() is None
    heart = Heart(board.file.environment, setup_seconds=9, floor_seconds=1, factor=2)
    heart.step, heart.kept_step = 17, 10
    first = board.read()
    heart.enter("checkpoint")
    beat = board.read()
    assert (beat.section, beat.step, beat.kept_step) == ("checkpoint", 17, 10)
    assert first is not None and beat.number > first.number
    board.clear()
    assert board.read() is None
    board.file.close()


def test_a_nested_command_writes_no_heartbeat_into_a_file_of_its_own(tmp_path):
    """It inherits the variable of a rank, but not the descriptor."""
    with open(tmp_path / "own", "w+") as own:
        heart = Heart({VARIABLE: f"{own.fileno()}:0"}, setup_seconds=9, floor_seconds=1, factor=2)
        heart.enter("step")
        assert not (tmp_path / "own").read_text()
    heart = Heart({VARIABLE: f"{own_closed()}:0"}, setup_seconds=9, floor_seconds=1, factor=2)
    heart.enter("step")


def own_closed():
    """Return a descriptor that was open a moment ago."""
    with open("/dev/null") as file:
        return file.fileno()


@pytest.mark.parametrize("text", ["x" * 10, "x" * 10_000_000], ids=["small", "beyond a pipe"])
def test_a_child_hands_over_its_result(text):
    child = Child(lambda: text)
    while child.is_running:
        time.sleep(0.01)
    assert child.result == text and child.failure == ""


@pytest.mark.parametrize("number", STOPPING)
def test_a_stop_of_all_processes_lets_a_child_finish(number, tmp_path):
    """Slurm sends SIGTERM to every process of a step, writers too."""
    may_end = tmp_path / "may_end"

    def write():
        while not may_end.exists():
            time.sleep(0.01)
        return "written"

    child = Child(write)
    assert child._process.pid is not None
    os.kill(child._process.pid, number)
    time.sleep(0.2)
    may_end.touch()
    deadline = time.monotonic() + 30
    while child.is_running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (child.result, child.failure) == ("written", "")


def test_a_child_that_a_kill_does_not_end_is_not_waited_for(monkeypatch):
    """It is in a call to a file system that hangs; here it gets no signal at all."""
    monkeypatch.setattr(child_module, "SECONDS_TO_DIE", 0.2, raising=False)
    child, begin = Child(lambda: time.sleep(20)), time.monotonic()
    kill = child._process.kill
    monkeypatch.setattr(child._process, "kill", lambda: None)
    child.kill("it was too slow")
    assert time.monotonic() - begin < 10
    assert not child.is_running and child.failure == "it was too slow"
    kill()


def test_a_process_that_ends_waits_for_no_child():
    program = """
import os, time
from megatron_eso.checkpoint.child import Child
child = Child(lambda: time.sleep(100))
print(child._process.pid, flush=True)
"""
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begin < 50
    status = Path(
        f"/proc/{done.stdout.strip()}/status"
    )  # of one that no one has asked after, perhaps
    assert not status.exists() or "State:\tZ" in status.read_text()


def test_a_child_that_dies_or_raises_is_a_failure_not_a_wait():
    def fail():
        raise OSError(28, "No space left on device")

    for function, words in ((fail, "No space left"), (lambda: os._exit(9), "code 9")):
        child = Child(function)
        while child.is_running:
            time.sleep(0.01)
        assert words in child.failure and child.result is None


FORKS_STUCK_AT_FIRST = """
import os, sys, time
from megatron_eso.checkpoint import child

forks = [0]

def before():
    forks[0] += 1

def in_child():
    if forks[0] <= int(sys.argv[1]):
        time.sleep(60)  # as one that waits for a lock that nobody holds

os.register_at_fork(before=before, after_in_child=in_child)
child.SIGN_OF_LIFE_SECONDS = 1.0
started = child.Child(lambda: "written")
while started.is_running:
    time.sleep(0.01)
print(started.result, started.failure, forks[0])
"""


@pytest.mark.parametrize("stuck", [0, 1, 3])
def test_a_child_that_never_runs_is_forked_again(stuck):
    """Python 3.11 can fork one: seen in a save, when another thread held the lock of the threads' list."""
    asked = [sys.executable, "-c", FORKS_STUCK_AT_FIRST, str(stuck)]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=60)
    if stuck == 3:
        assert "OSError: 3 forked processes gave no sign of life" in done.stderr
    else:
        assert done.stdout.split() == ["written", str(stuck + 1)], done.stderr


def test_a_child_never_looks_for_unused_objects():
    """It would destroy events and tensors of the parent's GPU, whose calls fail in a forked process."""
    child = Child(gc.isenabled)
    while child.is_running:
        time.sleep(0.01)
    assert child.result is False and gc.isenabled()


def test_tensors_of_a_gpu_are_written_from_memory_that_a_child_has_too():
    """Copies that are not waited for lie in pinned memory, where a forked writer may crash (Megatron-LM
    issue 1861).
    """
    asked = []

    class OfGpu:
        def to(self, device, non_blocking=False):
            asked.append((device, non_blocking))
            return self

    Plan(SimpleNamespace(write_buckets=[("file", "key", ([], [(None, OfGpu())]))]), None)
    assert asked == [("cpu", False)]
