"""Publishing a save: it is committed or given up, never both, and what is neither leaves no folder."""

import os
import shutil
import threading
import time

import pytest

from megatron_eso.checkpoint import folder as folder_module
from megatron_eso.checkpoint.folder import MANIFEST, MARKER, folder_of_step, hash_file, remove
from megatron_eso.checkpoint.publish import Publication
from megatron_eso.launch import lease


class Case:
    """A publication that waits for the test before it writes the marker, and before it ends."""

    def __init__(self, run, owner="", error=None):
        self.root, self.error = run / "checkpoints", error
        self.folder, self.older_removed = folder_of_step(self.root, 2), False
        self.folder.path.mkdir(parents=True)
        self.held = lease.Held(self.root, owner)
        self.may_write, self.may_end = threading.Event(), threading.Event()
        self.publication = Publication(
            self.folder, self.held, time.perf_counter(),
            write=self.write, remove_older=self.remove_older,
        )  # fmt: skip

    def write(self):
        assert self.may_write.wait(10)
        self.held.require()
        if self.error:
            raise self.error
        (self.folder.path / MARKER).touch()

    def remove_older(self):
        assert self.may_end.wait(10)
        self.older_removed = True

    def await_(self, is_true):
        """Wait until a condition is true."""
        deadline = time.monotonic() + 10
        while not is_true():
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def end(self):
        """Let it go on, and wait until its thread has ended."""
        self.may_write.set()
        self.may_end.set()
        self.await_(lambda: not self.publication.is_alive)


def test_the_marker_is_written_last_and_removed_first(tmp_path, monkeypatch):
    """A process may be killed in between."""
    folder = folder_of_step(tmp_path, 2)
    folder.path.mkdir()
    (folder.path / "file").write_text("x")

    def write_marker(path, text):
        assert path.name == MARKER and (folder.path / MANIFEST).is_file()
        path.write_text(text)

    monkeypatch.setattr(folder_module, "write_whole", write_marker)
    folder.commit()
    assert folder.is_committed and not folder.damage(hashes=True)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    remove(folder)
    assert not folder.is_committed and (folder.path / "file").is_file()


def test_a_file_that_is_shorter_than_its_writer_left_it_is_not_committed(tmp_path):
    folder = folder_of_step(tmp_path, 2)
    folder.path.mkdir()
    (folder.path / "file").write_text("x")
    with pytest.raises(OSError, match="file is not as long as when it was written"):
        folder.commit({"file": {"bytes": 2, "xxh3_128": "0"}})
    assert not folder.is_committed


def test_it_is_busy_until_committed_and_alive_until_older_ones_are_gone(tmp_path):
    case = Case(tmp_path)
    assert case.publication.look("") == (True, "")
    case.may_write.set()
    case.await_(lambda: case.publication.is_committed)
    assert case.publication.look("") == (False, "")
    assert case.publication.is_alive and not case.older_removed
    assert case.publication.look("late") == (False, ""), "a committed one cannot be given up"
    case.end()
    assert case.publication.look("late") == (False, "")
    assert case.older_removed and case.folder.is_committed


def test_one_that_was_given_up_removes_its_folder_although_it_wrote_all(tmp_path):
    case = Case(tmp_path)
    assert case.publication.look("late") == (True, "late")
    case.end()
    assert not case.publication.is_committed and not case.older_removed
    assert not case.folder.path.exists()


@pytest.mark.parametrize("error", [OSError("disk"), KeyError("file")])
def test_a_failure_is_told_once_the_folder_is_gone(tmp_path, error):
    case = Case(tmp_path, error=error)
    case.end()
    assert case.publication.look("") == (True, f"{type(error).__name__}: {error}")
    assert not case.folder.path.exists()


def test_without_the_lease_nothing_is_published_and_the_folder_stays(tmp_path):
    """It may be the other attempt's by then."""
    lease.acquire(tmp_path / "checkpoints", "7.0")
    case = Case(tmp_path, owner="7.0")
    lease.acquire(tmp_path / "checkpoints", "7.1")
    case.end()
    assert case.publication.look("") == (True, "")
    assert "7.0 lost its lease to 7.1" in case.held.lost
    assert case.folder.path.exists() and not case.folder.is_committed


def test_nor_does_one_that_was_given_up_remove_it(tmp_path):
    lease.acquire(tmp_path / "checkpoints", "7.0")
    case = Case(tmp_path, owner="7.0", error=OSError("disk"))
    case.publication.look("late")
    case.held.lost = "found out by a renewal"
    case.end()
    assert case.folder.path.exists()


def test_every_file_is_on_the_disk_before_the_marker(tmp_path, monkeypatch):
    """Writers flush their shards. After a power loss a marker beside an empty file would refuse it."""
    path = tmp_path / "step_0000000002"
    path.mkdir()
    for name in ("__0_0.distcp", "common.pt", "metadata.json"):
        (path / name).write_text(name)
    flushed = []

    def note(descriptor, flush=os.fsync):
        flushed.append(os.fstat(descriptor).st_ino)
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    shard = path / "__0_0.distcp"
    size = shard.stat().st_size
    folder_of_step(tmp_path, 2).commit({shard.name: {"bytes": size, "xxh3_128": hash_file(shard)}})
    wanted = [path / name for name in ("common.pt", "metadata.json", MANIFEST, MARKER)]
    assert flushed == [file.stat().st_ino for file in wanted]
