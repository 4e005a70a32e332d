"""Small files are whole or as before."""

import errno
import os

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
    files.write_json(path, {"a": 1})  # as it is already: nothing to write
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
