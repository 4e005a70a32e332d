"""The lease: newer attempts take it, older ones lose it, living processes keep it."""

import os
import platform
import subprocess
import time
from pathlib import Path

import pytest

from megatron_eso.errors import CheckpointError
from megatron_eso.launch import lease
from megatron_eso.launch.lease import (
    LEASE_FILE,
    QUIET_SECONDS,
    Held,
    _start_of,
    acquire,
    owner_name,
    read,
    release,
    require_lease,
)


def test_a_requeued_attempt_takes_the_lease_and_the_old_one_may_not_publish(tmp_path):
    acquire(tmp_path, "7.0")
    require_lease(tmp_path, "7.0")
    acquire(tmp_path, "7.1")
    with pytest.raises(CheckpointError, match=r"7\.0 lost its lease to 7\.1"):
        require_lease(tmp_path, "7.0")
    with pytest.raises(CheckpointError, match=r"7\.1 is newer"):
        acquire(tmp_path, "7.0")
    require_lease(tmp_path, "7.1")


def test_a_holder_renews_once_a_minute_and_remembers_a_loss(tmp_path, monkeypatch, caplog):
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    acquire(tmp_path, "7.0", now=0)
    held = Held(tmp_path, "7.0")
    held.renew()
    assert read(tmp_path)["updated"] == 0
    clock[0] += 61
    held.renew()
    assert read(tmp_path)["updated"] > 0
    with monkeypatch.context() as broken:
        broken.setattr("megatron_eso.launch.lease.write_json", lambda *a, **k: 1 / 0)
        held.renew()  # not due
        broken.setattr("megatron_eso.launch.lease.write_json", raises(OSError("no answer")))
        clock[0] += 61
        held.renew()
    assert "could not be renewed: no answer" in caplog.text and not held.lost
    acquire(tmp_path, "7.1")
    clock[0] += 61
    held.renew()
    assert "7.0 lost its lease to 7.1" in held.lost
    with pytest.raises(CheckpointError, match="lost its lease"):
        held.require()


def test_without_an_owner_no_lease_is_needed(tmp_path):
    held = Held(tmp_path, "")
    held.require()
    assert not held.lost and read(tmp_path) is None


def raises(error):
    """Return a function that raises an error."""

    def function(*arguments, **settings):
        raise error

    return function


def test_attempts_compare_as_numbers_not_as_text(tmp_path):
    acquire(tmp_path, "9.9")
    acquire(tmp_path, "9.10")
    acquire(tmp_path, "10.0")
    with pytest.raises(CheckpointError):
        acquire(tmp_path, "9.11")


def test_a_living_process_of_this_host_keeps_its_lease(tmp_path):
    mine = owner_name({})
    acquire(tmp_path, mine)
    with pytest.raises(CheckpointError, match="runs on this host"):
        acquire(tmp_path, f"{platform.node()}/1/5")


def test_a_dead_process_or_a_reused_pid_loses_it(tmp_path):
    child = subprocess.Popen(["true"])
    child.wait()
    for holder in (f"{platform.node()}/{child.pid}/77", f"{platform.node()}/{os.getpid()}/1"):
        acquire(tmp_path, holder)
        acquire(tmp_path, owner_name({}))
        assert read(tmp_path)["owner"] == owner_name({})
        release(tmp_path, owner_name({}))


def test_a_process_that_has_ended_but_was_not_waited_for_loses_it(tmp_path):
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        acquire(tmp_path, f"{platform.node()}/{child.pid}/{_start_of(child.pid)}")
        child.kill()
        deadline = time.monotonic() + 10
        while ") Z " not in Path(f"/proc/{child.pid}/stat").read_text():
            assert time.monotonic() < deadline
        acquire(tmp_path, owner_name({}))


def test_of_two_that_take_it_at_once_one_has_it(tmp_path, monkeypatch):
    write = lease.write_json
    other = {"owner": "8.1", "updated": 0.0}
    monkeypatch.setattr(lease, "write_json", lambda path, _, **kind: write(path, other, **kind))
    with pytest.raises(CheckpointError, match=r"7\.0 lost its lease to 8\.1"):
        acquire(tmp_path, "7.0")


def test_another_host_keeps_it_while_it_renews(tmp_path):
    acquire(tmp_path, "elsewhere/4/1", now=1000.0)
    with pytest.raises(CheckpointError, match="renewed 1 s ago"):
        acquire(tmp_path, "here/4/1", now=1001.0)
    require_lease(tmp_path, "elsewhere/4/1", now=1500.0)
    with pytest.raises(CheckpointError):
        acquire(tmp_path, "here/4/1", now=1001.0 + QUIET_SECONDS)
    acquire(tmp_path, "here/4/1", now=1500.0 + QUIET_SECONDS)


def test_a_missing_or_damaged_lease_publishes_nothing(tmp_path):
    with pytest.raises(CheckpointError, match=r"is missing or damaged, so 1\.0 has no lease"):
        require_lease(tmp_path, "1.0")
    (tmp_path / LEASE_FILE).write_text("{")
    with pytest.raises(CheckpointError, match=r"is missing or damaged, so 1\.0 has no lease"):
        require_lease(tmp_path, "1.0")


def test_release_is_for_the_owner_only(tmp_path):
    acquire(tmp_path, "1.0")
    release(tmp_path, "2.0")
    require_lease(tmp_path, "1.0")
    release(tmp_path, "1.0")
    assert read(tmp_path) is None


def test_the_job_script_names_the_attempt():
    ours = {"MEGATRON_ESO_ATTEMPT": "3.2"}
    assert owner_name({"SLURM_JOB_ID": "3", **ours}) == "3.0"
    assert owner_name({"SLURM_JOB_ID": "3", "SLURM_RESTART_COUNT": "2", **ours}) == "3.2"


def test_two_runs_in_one_allocation_are_told_apart(tmp_path):
    """As from two shells of an salloc: the attempt is the same, and the first run lives."""
    owner = owner_name({"SLURM_JOB_ID": "3"})
    assert owner == "3.0@" + owner_name({})
    acquire(tmp_path, owner)
    second = owner.rsplit("/", 2)[0] + "/1/7"
    with pytest.raises(CheckpointError, match="runs on this host"):
        acquire(tmp_path, second)
    with pytest.raises(CheckpointError, match=r"3\.0@.* is newer than 2\.5"):
        acquire(tmp_path, "2.5")
    acquire(tmp_path, "3.1@elsewhere/1/7")  # the requeued job
    with pytest.raises(CheckpointError, match="renewed 0 s ago"):
        acquire(tmp_path, owner_name({"SLURM_JOB_ID": "3", "SLURM_RESTART_COUNT": "1"}))
    assert read(tmp_path)["owner"] == "3.1@elsewhere/1/7"


def squeue(folder, monkeypatch, text, code=0):
    """Let squeue print a text."""
    program = folder / "squeue"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_of_two_jobs_slurm_says_whether_the_other_one_runs(tmp_path, monkeypatch):
    run = tmp_path / "run"
    folder = run / "checkpoints"
    acquire(folder, "7.0")
    squeue(tmp_path, monkeypatch, f"7|RUNNING|None|n0|1:00|N/A|megatron-eso|{run}")
    for other in ("8.0", "6.0"):
        with pytest.raises(CheckpointError, match="its job 7 is running"):
            acquire(folder, other)
    for line in (
        "",  # it has left the queue
        f"7|PENDING|BeginTime||0:00|N/A|megatron-eso|{run}",
        f"7|COMPLETING|None|n0|1:00|N/A|megatron-eso|{run}",
        "7|RUNNING|None|n0|1:00|N/A|someone else|/home",  # of a cluster that was set up anew
        "7|RUNNING|None|n0|1:00|N/A|megatron-eso|/another/run",
    ):
        squeue(tmp_path, monkeypatch, line)
        for other in ("8.0", "6.0"):
            acquire(folder, other)
            (folder / LEASE_FILE).unlink()
            acquire(folder, "7.0")
    squeue(tmp_path, monkeypatch, "down", code=1)  # as in a container: the numbers decide
    with pytest.raises(CheckpointError, match=r"7\.0 is newer than 6\.0"):
        acquire(folder, "6.0")
    acquire(folder, "8.0")


def test_an_arrays_task_is_known_by_the_arrays_folder(tmp_path, monkeypatch):
    acquire(tmp_path / "runs" / "3" / "checkpoints", "7.0")
    squeue(tmp_path, monkeypatch, f"5_3|RUNNING|None|n0|1:00|N/A|megatron-eso|{tmp_path}/runs")
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    for folder in ("runs", "link"):
        with pytest.raises(CheckpointError, match="its job 7 is running"):
            acquire(tmp_path / folder / "3" / "checkpoints", "8.0")


def test_a_job_of_anothers_script_is_alive_while_it_runs(tmp_path, monkeypatch):
    acquire(tmp_path, "7.0@elsewhere/4/1")
    squeue(tmp_path, monkeypatch, "7|RUNNING|None|n0|1:00|N/A|(null)|/home/me")
    with pytest.raises(CheckpointError, match="its job 7 is running"):
        acquire(tmp_path, "8.0")
    squeue(tmp_path, monkeypatch, "")
    acquire(tmp_path, "6.0")
