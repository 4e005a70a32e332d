"""What a start may change in a run's folder, and what a run that ends badly says there."""

import errno
import json
import os
import resource
import shutil
import threading
import time
from contextlib import contextmanager

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from megatron_eso.checkpoint.folder import folder_of_step, list_folders
from megatron_eso.config.schema import DataConfig, DataSourceConfig, OptimizerConfig, RunConfig
from megatron_eso.errors import ConfigError
from megatron_eso.launch import lease
from megatron_eso.train.learning_rate import change_of_schedule
from megatron_eso.train.run_folder import RunFolder
from megatron_eso.train.spare_output import Board, SpareOutput
from tests.resilience.conftest import SETTINGS

ALONE = {"num_ranks": 1, "max_restarts": 0}
KEPT = ("config.yaml", "run.json", "tokenizer.json", "status.json", "metrics.jsonl")


@contextmanager
def files_end_at(num_bytes):
    """As on a full disk: files can be made, and writing beyond this fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def content(folder):
    return {name: (folder / name).read_bytes() for name in KEPT if (folder / name).exists()}


@pytest.mark.parametrize("num_bytes", [0, 600])
def test_a_file_that_cannot_be_written_is_as_before_and_named(tmp_path, num_bytes):
    folder = RunFolder(tmp_path)
    folder.describe(RunConfig(name="one"), b"tokens")
    before = content(tmp_path)
    assert len(before["config.yaml"]) > 600
    with files_end_at(num_bytes), pytest.raises(OSError, match=f"{tmp_path}/config.yaml"):
        folder.describe(RunConfig(name="two"), b"others")
    assert content(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(before)


def test_a_file_that_is_right_already_is_left_alone(tmp_path):
    folder = RunFolder(tmp_path)
    folder.describe(RunConfig(), b"tokens")
    before = [(tmp_path / name).stat().st_ino for name in ("config.yaml", "tokenizer.json")]
    folder.describe(RunConfig(), b"tokens")
    assert [(tmp_path / n).stat().st_ino for n in ("config.yaml", "tokenizer.json")] == before


def points_on_board(folder, tag):
    board = EventAccumulator(str(folder))
    board.Reload()
    return [point.step for point in board.Scalars(tag)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_board_goes_on_after_a_full_disk_and_each_failure_is_told_once(
    tmp_path, monkeypatch, caplog
):
    others = set(threading.enumerate())
    board, output = Board(tmp_path), SpareOutput("tensorboard")

    def add(step):
        output.attempt(lambda: board.add({"loss": 1.0}, step))

    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    for number in (1, 2):
        add(number)
        board._writer.flush()
        with monkeypatch.context() as patch, files_end_at(0):
            patch.setattr(RecordWriter, "write", full)
            deadline = time.monotonic() + 30
            while len(caplog.messages) < number and time.monotonic() < deadline:
                add(10)  # the thread that writes ends, which a later write is told
            for _ in range(5):
                add(10)
        assert len(caplog.messages) == number
        assert "tensorboard cannot be written: " in caplog.messages[-1]
        assert len(list(tmp_path.iterdir())) == number
    add(3)
    board.close()
    for thread in set(threading.enumerate()) - others:
        thread.join()  # one that has not ended yet would end as the next test's failure
    assert points_on_board(tmp_path, "loss") == [1, 2, 3]


@pytest.mark.slow
def test_scores_that_cannot_be_written_do_not_fail_a_finished_run(faulty):
    folder = faulty.folder / "x" / "scores"
    (folder / "evaluation.json").mkdir(parents=True)
    out = faulty.run("scores", "train.steps=2", "parallel.tensor=1", **ALONE)
    assert "evaluation.json cannot be written" in out and "Traceback" not in out
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"


@pytest.mark.slow
def test_a_file_in_the_place_of_tensorboards_folder_is_refused_on_all_ranks(faulty):
    folder = faulty.folder / "x" / "board"
    folder.mkdir()
    (folder / "tensorboard").touch()
    out = faulty.run("board", "train.steps=2", code=2, max_restarts=0)
    assert "folder=board cannot be written" in out and "board/tensorboard" in out
    assert "Traceback" not in out


def begun(folder, config, *, has_checkpoint=True, has_metrics=False):
    """Return the folder of a run that has begun."""
    run = RunFolder(folder)
    run.describe(config, b"tokens")
    if has_checkpoint:
        checkpoint = folder_of_step(run.checkpoints, 1)
        checkpoint.path.mkdir(parents=True)
        (checkpoint.path / "COMMITTED").touch()
    if has_metrics:
        (folder / "metrics.jsonl").touch()
    return run


@pytest.mark.parametrize(
    ("has_checkpoint", "has_metrics"), [(True, False), (False, True), (True, True)]
)
def test_other_settings_are_refused_once_a_run_has_begun(tmp_path, has_checkpoint, has_metrics):
    run = begun(tmp_path, RunConfig(), has_checkpoint=has_checkpoint, has_metrics=has_metrics)
    other = RunConfig(optimizer=OptimizerConfig(beta1=0.5))
    with pytest.raises(ConfigError, match=r"optimizer.beta1: 0.9 there, 0.5 asked"):
        run.earlier_config(other)
    assert run.earlier_config(RunConfig()) is not None


def test_other_settings_after_a_start_that_left_nothing_are_fine(tmp_path):
    run = begun(tmp_path, RunConfig(), has_checkpoint=False)
    assert run.earlier_config(RunConfig(optimizer=OptimizerConfig(beta1=0.5))) is None


def of_data(*sources):
    return RunConfig(data=DataConfig(sources=[DataSourceConfig(*source) for source in sources]))


def test_data_that_lies_elsewhere_now_is_told_by_the_fingerprint_of_a_checkpoint(tmp_path):
    run = begun(tmp_path, of_data(("d/train", 1.0), ("e", 2.0)))
    assert run.earlier_config(of_data(("./d/train", 1.0), ("/elsewhere/e", 2.0))) is not None
    for other in (of_data(("d/train", 2.0), ("e", 2.0)), of_data(("d/train", 1.0))):
        with pytest.raises(ConfigError, match=r"data.sources: .* there"):
            run.earlier_config(other)


def test_other_data_without_a_checkpoint_to_compare_with_is_refused(tmp_path):
    run = begun(tmp_path, of_data(("d/train", 1.0)), has_checkpoint=False, has_metrics=True)
    with pytest.raises(ConfigError, match=r"data.sources: .*d/train"):
        run.earlier_config(of_data(("e/train", 1.0)))


@pytest.mark.slow
def test_a_run_goes_on_after_its_data_was_moved_but_not_with_other_data(faulty):
    settings = ("parallel.tensor=1", "train.save_every_steps=1")
    faulty.run("moved", *settings, "train.steps=2", **ALONE)
    shutil.copytree(faulty.folder / "data", faulty.folder / "moved data")
    moved = "data.sources=[{path: '../moved data/train'}]"
    out = faulty.run("moved", *settings, "train.steps=3", moved, **ALONE)
    assert "continuing from" in out
    other = "data.sources=[{path: ../data/validation}]"
    out = faulty.run("moved", *settings, "train.steps=4", other, code=4, **ALONE)
    assert "was trained on other data (data.sources" in out


@pytest.mark.slow
def test_a_start_on_a_full_disk_is_refused_and_the_next_one_continues(faulty):
    settings = [*SETTINGS, "parallel.tensor=1", "train.steps=2", "folder=starved"]
    faulty.command("train", "run.yaml", *settings)
    folder = faulty.folder / "x" / "starved"
    before = content(folder)
    limits = {resource.RLIMIT_FSIZE: 1024}
    out = faulty.command("train", "run.yaml", *settings, code=2, limits=limits)
    assert "folder=starved cannot be written" in out and "Traceback" not in out
    assert content(folder) == before
    assert lease.read(folder / "checkpoints") is None
    faulty.command("train", "run.yaml", *settings)


@pytest.mark.slow
def test_a_process_that_is_refused_the_lease_changes_nothing(faulty):
    folder = faulty.folder / "x" / "alive"
    folder.mkdir()
    for name in KEPT[:-1]:
        (folder / name).write_text("theirs")
    lease.acquire(folder / "checkpoints", lease.owner_name({}))
    before = content(folder)
    out = faulty.command("train", "run.yaml", *SETTINGS, "parallel.tensor=1", "train.steps=2",
                         "folder=alive", code=4)  # fmt: skip
    assert f"/{os.getpid()}/" in out and "runs on this host" in out
    assert content(folder) == before
    assert {path.name for path in folder.iterdir()} == {*before, "checkpoints"}
    assert lease.read(folder / "checkpoints")["owner"] == lease.owner_name({})


@pytest.mark.slow
def test_a_signal_without_room_for_a_checkpoint_is_an_error_not_a_stop(faulty):
    faults = [
        {"kind": "signal", "rank": 0, "step": 6, "signal": "SIGTERM"},
        {"kind": "full_disk", "rank": 0, "step": 7},
    ]
    settings = ("train.steps=12", "parallel.tensor=1")
    out = faulty.run("unsaved", *settings, code=4, faults=faults, **ALONE)
    assert "stopped by SIGTERM at step 7, but the last checkpoint could not be written" in out
    folder = faulty.folder / "x" / "unsaved"
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "failed" and "stopped by SIGTERM" in status["reason"]
    assert faulty.events("unsaved", "stop")[0]["state"] == "failed"
    assert lease.read(folder / "checkpoints") is None


@pytest.mark.slow
def test_a_run_that_cannot_write_its_last_checkpoint_has_failed(faulty):
    settings = ("train.steps=3", "parallel.tensor=1")
    faults = [{"kind": "full_disk", "rank": 0, "step": 3}]
    faulty.run("last", *settings, code=4, faults=faults, **ALONE)
    folder = faulty.folder / "x" / "last"
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "failed" and "the last checkpoint could not be" in status["reason"]


@pytest.mark.slow
def test_a_run_of_another_length_says_what_becomes_of_its_schedule(faulty):
    """And a torn line of metrics does not take the next one along."""
    settings = ("parallel.tensor=1", "optimizer.schedule=cosine", "train.log_every_steps=1")
    folder = faulty.folder / "x" / "longer"
    out = faulty.run("longer", *settings, "train.steps=4", **ALONE)
    assert "the run had" not in out
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "lo')
    out = faulty.run("longer", *settings, "train.steps=6", **ALONE)
    assert "the run had 4 steps and has 6 now" in out
    assert "the learning rate is 4.393e-05 in step 4 and 7.5e-05 in step 5" in out
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "grad_norm" in line] == [1, 2, 3, 4, 5, 6]
    before = content(folder)
    out = faulty.run("longer", *settings, "train.steps=5", code=2, **ALONE)
    assert "has done 6 steps, more than the 5 that train.steps" in out
    assert content(folder) == before
    assert list_folders(folder / "checkpoints")[-1].step == 6
    out = faulty.run("longer", *settings, "train.steps=6", **ALONE)
    assert "finished" in out and "the run had" not in out


def reported(folder):
    """Return what a run has reported: metrics, its ledger, and TensorBoard's numbers by tag."""
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    scalars = {tag: board.Scalars(tag) for tag in board.Tags()["scalars"]}
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], sorted((folder / "tensorboard").iterdir()), scalars


@pytest.mark.slow
def test_a_finished_run_that_is_started_again_reports_nothing_twice(faulty):
    settings = ("train.steps=4", "data.validation={v: ../data/validation}", "parallel.tensor=1")
    folder = faulty.folder / "x" / "again"
    faulty.run("again", *settings, **ALONE)
    before, kept, log = reported(folder), content(folder), (folder / "log.txt").read_text()
    for ranks in (1, 2):  # another layout is no reason to evaluate again
        given = (*settings, f"parallel.tensor={ranks}")
        out = faulty.run("again", *given, num_ranks=ranks, max_restarts=0)
        assert "again has finished already: its 4 steps are done, saved and evaluated" in out
    assert reported(folder) == before
    assert [event["state"] for event in faulty.events("again", "stop")] == ["finished"]
    last = json.loads((folder / "status.json").read_text())
    first = json.loads(kept.pop("status.json"))
    assert last.pop("updated") > first.pop("updated") and last == first
    assert {name: (folder / name).read_bytes() for name in kept} == kept
    assert len((folder / "log.txt").read_text().removeprefix(log).splitlines()) == 2
    other = "data.sources=[{path: ../data/validation}]"
    assert "on other data" in faulty.run("again", *settings, other, code=4, **ALONE)
    assert lease.read(folder / "checkpoints") is None


@pytest.mark.slow
def test_first_weights_that_are_missing_are_named_by_their_setting(faulty):
    settings = ("train.steps=1", "parallel.tensor=1", "checkpoint.init_from=../nowhere")
    out = faulty.run("unborn", *settings, code=4, **ALONE)
    assert "checkpoint.init_from: ../nowhere does not exist" in out


@pytest.mark.slow
def test_a_finished_run_is_evaluated_again_if_that_is_asked_for_or_was_cut_short(faulty):
    settings = ("train.steps=4", "data.validation={v: ../data/validation}", "parallel.tensor=1")
    folder = faulty.folder / "x" / "scored"
    faulty.run("scored", *settings, **ALONE)
    lines, _, scalars = reported(folder)
    out = faulty.run("scored", *settings, "eval.nelbo_repeats=2", **ALONE)
    assert "finished already" not in out
    more, _, now = reported(folder)
    assert more[: len(lines)] == lines and all("validation" in line for line in more[len(lines) :])
    assert len(more) > len(lines)
    stall = "time/checkpoint_stall_seconds"
    assert now[stall] == scalars[stall] and len(now[stall]) == 1  # nothing was saved again
    (folder / "evaluation.json").unlink()
    out = faulty.run("scored", *settings, "eval.nelbo_repeats=2", **ALONE)
    assert "finished already" not in out and (folder / "evaluation.json").is_file()
    (found,) = list_folders(folder / "checkpoints")
    shutil.rmtree(found.path)
    out = faulty.run("scored", *settings, "eval.nelbo_repeats=2", **ALONE)
    assert "finished already" not in out and list_folders(folder / "checkpoints")[-1].step == 4


def test_a_length_that_a_schedule_does_not_go_by_changes_nothing():
    constant, wsd = OptimizerConfig(), OptimizerConfig(schedule="wsd", decay_steps=10)
    cosine = OptimizerConfig(schedule="cosine", decay_steps=50)
    for optimizer in (constant, wsd, cosine):
        assert change_of_schedule(60, optimizer, before=100, now=200) == ""


def test_a_decay_that_began_and_is_taken_back_is_told_with_both_rates():
    wsd = OptimizerConfig(schedule="wsd", decay_steps=10, learning_rate=1.0)
    told = change_of_schedule(99, wsd, before=100, now=200)
    assert "is 0.2 in step 99 and 1 in step 100" in told
