"""Small files are either whole or unchanged."""

import errno
import os
from pathlib import Path

import pytest

from megatron_eso import files


def test_content_is_replaced_and_nothing_is_left(tmp_path):
    path = tmp_path / "a.txt"
    files.write_whole(path, "bär")
    files.write_whole(path, b"\x00\xff", durable=False)
    assert path.read_bytes() == b"\x00\xff"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_use_names_of_their_own(tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr("pathlib.Path.replace", lambda part, target: used.append(part))
    for _ in range(2):
        files.write_whole(tmp_path / "some.json", "{}")
    assert len(set(used)) == 2
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_file_as_it_was_and_names_it(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        files.write_json(path, {"a": 2})
    assert caught.value.filename == str(path)
    files.write_json(path, {"a": 1})  # the file already has this content: nothing to write
    assert files.read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b"\xff"])
def test_what_is_no_object_reads_as_empty(content, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    assert files.read_json(tmp_path / "a.json") == {}
    assert files.read_json(tmp_path / "missing.json") == {}


def test_a_missing_folder_is_said_with_the_files_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing/a\.txt"):
        files.write_whole(tmp_path / "missing" / "a.txt", "")


def test_a_figure_is_whole_or_as_it_was(tmp_path):
    from matplotlib.figure import Figure

    path = tmp_path / "plot.svg"
    files.write_figure(path, Figure(), dpi=50)
    before = path.read_bytes()
    assert before.startswith(b"<?xml")

    class Broken(Figure):
        def savefig(self, fname, **how):
            fname.write(b"half")
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        files.write_figure(path, Broken(), dpi=50)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="xyz"):
        files.write_figure(tmp_path / "plot.xyz", Figure(), dpi=50)


def test_a_new_folder_takes_its_name_when_it_is_whole_and_no_others_is_touched(tmp_path):
    for name in ("out.tmp", f".out.part-{os.getpid()}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("keep")
    mine = sorted(tmp_path.iterdir())
    with files.new_folder(tmp_path / "out") as folder:
        assert folder.name == "out" and not (tmp_path / "out").exists()
        (folder / "a").write_text("whole")
    assert sorted(tmp_path.iterdir()) == sorted([*mine, tmp_path / "out"])
    assert (tmp_path / "out" / "a").read_text() == "whole"
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "out.tmp").stat().st_mode
    with pytest.raises(ValueError, match="broken"), files.new_folder(tmp_path / "new"):
        raise ValueError("broken")
    assert not list(tmp_path.glob("*new*")) and not list(tmp_path.glob(".new*"))


def test_a_new_folder_may_be_the_working_one_or_a_link_to_an_empty_one(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("there")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (Path("."), tmp_path / "link"):
        with files.new_folder(out) as folder:
            (folder / "a").write_text("whole")
        assert (out / "a").read_text() == "whole"
    assert (tmp_path / "link").is_symlink()


def test_a_new_folder_is_refused_in_place_of_a_full_one_or_a_file_by_its_name(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("keep")
    for out in (tmp_path / "full", tmp_path / "full" / "file"):
        with pytest.raises(OSError) as caught, files.new_folder(out):
            raise AssertionError("begun")
        assert caught.value.filename == str(out)
    with pytest.raises(OSError, match="other") as caught, files.new_folder(tmp_path / "new"):
        raise OSError(errno.EIO, "other", "input.txt")
    assert caught.value.filename == "input.txt"
    assert (tmp_path / "full" / "file").read_text() == "keep"
