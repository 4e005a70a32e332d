"""Whole training jobs on data in an object store: alone, two at a time, and killed as a group."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.data.conftest import SEQUENCE_LENGTH, VOCAB_SIZE, in_small_shards

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent
SETTINGS = [
    "model.hidden_size=16", "model.num_layers=2", "model.num_heads=2", f"model.vocab_size={VOCAB_SIZE}",
    f"train.sequence_length={SEQUENCE_LENGTH}", "train.global_batch_rows=8", "train.micro_batch_rows=2",
    "train.log_every_steps=1", "eval.num_rows=4", "precision.dtype=fp32", "objective.alpha_0=0.5",
    "data.timeout_seconds=20", "data.cache_dir=cache",
]  # fmt: skip
STEPS = 12
JOBS: list[subprocess.Popen] = []


@pytest.fixture(scope="module", autouse=True)
def end_jobs():
    yield
    for job in JOBS:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()


@pytest.fixture(scope="module")
def address(store, prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs") / "set"
    shutil.copytree(prepared, folder)
    for split in ("train", "validation"):
        in_small_shards(folder / split, shard_bytes=2500)
    return store.upload(folder, "jobs")


def start(folder: Path, name: str, address: str, *overrides: str) -> subprocess.Popen:
    """Start a job of two ranks in a process group of its own."""
    (folder / "temporary").mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(
        f"data:\n  sources: [{{path: '{address}/train'}}]\n"
        f"  validation: {{text: '{address}/validation'}}\n"
    )
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        "TMPDIR": str(folder / "temporary"),
    }  # fmt: skip
    command = [sys.executable, "-m", "megatron_eso", "train", "run.yaml", f"name={name}",
               "parallel.local_ranks=2", *SETTINGS, *overrides]  # fmt: skip
    with (folder / f"{name}.out").open("w") as output:
        job = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    JOBS.append(job)
    return job


def finish(process: subprocess.Popen, folder: Path, name: str) -> list[dict]:
    """Wait for a job and return its metrics."""
    code = process.wait(timeout=300)
    assert code == 0, (folder / f"{name}.out").read_text()
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [one for line in lines if "loss" in (one := json.loads(line))]


@pytest.fixture(scope="module")
def alone(address, tmp_path_factory):
    """Return the folder and the metrics of a job that ran alone."""
    folder = tmp_path_factory.mktemp("alone")
    job = start(folder, "alone", address, f"train.steps={STEPS}")
    return folder, finish(job, folder, "alone")


def test_a_run_trains_and_validates_from_an_object_store_and_can_be_sampled_from(alone):
    folder, metrics = alone
    assert [one["step"] for one in metrics] == list(range(1, STEPS + 1))
    scores = json.loads((folder / "runs/alone/evaluation.json").read_text())
    assert scores["text"][0]["metric"] == "nelbo"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "megatron_eso", "sample", "runs/alone", "--num-samples", "1"]
    sampled = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=240)
    assert sampled.returncode == 0, sampled.stderr  # the run keeps its tokenizer


def test_the_share_of_a_step_that_waits_for_data_is_on_the_board(alone):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, metrics = alone
    board = EventAccumulator(str(folder / "runs/alone/tensorboard"))
    board.Reload()
    points = board.Scalars("time/share_waiting_for_data")
    assert [point.step for point in points] == [one["step"] for one in metrics]
    for point, one in zip(points, metrics, strict=True):
        share = one["seconds_data"] / one["seconds_per_step"]
        assert point.value == pytest.approx(share, rel=1e-5)
        assert 0 < point.value <= 1


def test_two_jobs_at_once_on_one_small_cache_read_what_one_alone_reads(address, alone, tmp_path):
    limit = "data.cache_limit_gib=1e-5"  # 10 kB: four of the shards
    jobs = {
        name: start(tmp_path, name, address, f"train.steps={STEPS}", limit) for name in ("a", "b")
    }
    expected = [one["loss"] for one in alone[1]]
    for name, job in jobs.items():
        assert [one["loss"] for one in finish(job, tmp_path, name)] == expected
    cached = list((tmp_path / "cache").rglob("*.mds"))
    assert sum(path.stat().st_size for path in cached) <= 1e-5 * 2**30
    assert not list((tmp_path / "cache").rglob("*.part"))


def family(process: subprocess.Popen) -> list[psutil.Process]:
    mother = psutil.Process(process.pid)
    return [mother, *mother.children(recursive=True)]


def shared_memory_of(process: psutil.Process) -> list[str]:
    """Return what a process holds in /dev/shm, also what has no name any more."""
    try:
        maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        opened = [os.readlink(link) for link in Path(f"/proc/{process.pid}/fd").iterdir()]
    except OSError:
        return []
    return [line for line in [*maps, *opened] if "/dev/shm" in line]


def test_a_killed_group_leaves_nothing_in_shared_memory_nor_in_the_temporary_folder(
    address, tmp_path
):
    before = set(os.listdir("/dev/shm"))
    job = start(tmp_path, "killed", address, "train.steps=100000")
    metrics, deadline = tmp_path / "runs/killed/metrics.jsonl", time.monotonic() + 240
    while not metrics.is_file() or metrics.read_text().count("\n") < 5:
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    processes = family(job)
    assert len(processes) >= 3
    assert [line for one in processes for line in shared_memory_of(one)] == []
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    _, alive = psutil.wait_procs(processes[1:], timeout=60)
    assert not alive
    # Importing torch makes this empty folder, one per user, whatever the program does.
    left = [path for path in (tmp_path / "temporary").rglob("*")]
    assert [path.name for path in left if not path.name.startswith("torchinductor_")] == []
    # Other programs of this machine may come and go; ours would stay.
    deadline = time.monotonic() + 60
    while left := set(os.listdir("/dev/shm")) - before:
        assert time.monotonic() < deadline, left
        time.sleep(0.5)
