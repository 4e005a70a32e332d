"""Inputs of every kind give the same rows, bad ones an error that names file and line."""

import errno
import gzip
import io
import json
import multiprocessing
import os
import signal
import sys
import time
import types
from typing import Any
from unittest import mock

import numpy as np
import pytest
from tokenizers import Tokenizer as Core
from tokenizers import models

from megatron_eso.data import partition, workers
from megatron_eso.data.documents import documents_of
from megatron_eso.data.file_kinds import FileChoice
from megatron_eso.data.manifest import load_manifest
from megatron_eso.data.prepare import check_options, prepare
from megatron_eso.data.progress import Progress
from megatron_eso.data.reader import ValidationReader
from megatron_eso.data.sources import find_files, partitions_of
from megatron_eso.data.tokenizer import PIECE_CHARACTERS, Tokenizer, pieces_of
from megatron_eso.errors import DataError
from tests.data.conftest import SEQUENCE_LENGTH, VOCAB_SIZE, options, write_corpus


def texts_of(path, text_key="text", partition_bytes=None) -> list[str]:
    """Return the documents of a source, through its partitions."""
    partitions = partitions_of(find_files([str(path)]), partition_bytes)
    pieces = [piece for partition in partitions for piece in partition.pieces]
    documents = [one for piece in pieces for one in documents_of(piece, text_key=text_key)]
    assert all(document.problem is None for document in documents)
    return [document.text for document in documents]


def save_parquet(path, texts) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(arrow.table({"text": texts}), path, row_group_size=37)


def save_arrow(path, texts) -> None:
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table({"text": texts})
    with arrow.OSFile(str(path), "wb") as file, arrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=50)


def save_zstandard(path, texts) -> None:
    zstandard = pytest.importorskip("zstandard")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    path.write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))


def save_gzip(path, texts) -> None:
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("corpus.jsonl.gz", save_gzip),
        ("corpus.json.gz", save_gzip),
        ("CORPUS.JSONL.GZ", save_gzip),
        ("corpus.json.zst", save_zstandard),
        ("corpus.jsonl.zst", save_zstandard),
        ("corpus.parquet", save_parquet),
        ("data-00000-of-00001.arrow", save_arrow),
    ],
)
def test_every_format_gives_the_same_documents(tmp_path, name, save):
    texts = write_corpus(tmp_path / "corpus.jsonl", num_documents=200)
    (tmp_path / "other").mkdir()
    save(tmp_path / "other" / name, texts)
    assert texts_of(tmp_path / "other" / name) == texts


@pytest.mark.parametrize(
    "content", ['[{"text": "a"}]', '{\n "text": "a"\n}'], ids=["array", "indented"]
)
def test_a_json_file_that_is_not_lines_is_refused_with_what_is_expected(tmp_path, content):
    with gzip.open(tmp_path / "a.json.gz", "wt") as file:
        file.write("\n" + content)
    with pytest.raises(
        DataError, match=r"a\.json\.gz begins with .*: expected a JSON object per line"
    ):
        find_files([str(tmp_path)])


@pytest.mark.parametrize(
    "name", ["a.jsonl.bz2", "a.xz", "a.ZIP", "a.tar.gz", "a.csv", "a.feather", "a.parquet.gz"]
)
def test_a_container_that_is_not_read_is_refused_and_not_taken_for_text(tmp_path, name):
    (tmp_path / name).write_text("text, even if it could be read as such")
    with pytest.raises(
        DataError, match=rf"{name}: \.[a-z.0-9]+ files are not read; .*--exclude .*\.jsonl"
    ):
        find_files([str(tmp_path)])


def zstandard_frames(*texts: str) -> bytes:
    compressor = pytest.importorskip("zstandard").ZstdCompressor()
    lines = [(json.dumps({"text": text}) + "\n").encode() for text in texts]
    return b"".join(compressor.compress(line) for line in lines)


def test_frames_of_a_zstandard_file_follow_each_other(tmp_path):
    texts = write_corpus(tmp_path / "corpus.jsonl")
    skippable = b"\x50\x2a\x4d\x18\x04\0\0\0seek"
    content = zstandard_frames(*texts[:200]) + skippable + zstandard_frames(*texts[200:])
    (tmp_path / "frames.jsonl.zst").write_bytes(content)
    assert texts_of(tmp_path / "frames.jsonl.zst") == texts


@pytest.mark.parametrize("name", ["cut.jsonl.zst", "cut.txt.zst"])
def test_a_zstandard_file_that_was_cut_short_is_an_error(tmp_path, name):
    content = zstandard_frames("the first frame", " ".join(map(str, range(10_000))))
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=rf"cannot read .*{name}: it ends inside a zstd frame"):
        texts_of(tmp_path / name)


@pytest.mark.parametrize("save", [save_zstandard, save_gzip], ids=["jsonl.zst", "jsonl.gz"])
def test_a_damaged_compressed_file_is_an_error_that_names_it(tmp_path, save, request):
    path = tmp_path / f"damaged.{request.node.callspec.id}"
    save(path, write_corpus(tmp_path / "corpus.jsonl"))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = b"\xff" * 64
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read .*damaged\.jsonl"):
        texts_of(path)


@pytest.mark.parametrize("partition_bytes", [1, 100, 1000, 7919, 1 << 20])
def test_ranges_of_a_jsonl_file_give_every_line_once(corpus, partition_bytes):
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    assert texts_of(corpus, partition_bytes=partition_bytes) == texts


def test_row_groups_of_a_parquet_file_give_every_row_once(tmp_path):
    texts = write_corpus(tmp_path / "corpus.jsonl", num_documents=200)
    save_parquet(tmp_path / "corpus.parquet", texts)
    assert texts_of(tmp_path / "corpus.parquet", partition_bytes=3000) == texts
    assert len(partitions_of(find_files([str(tmp_path / "corpus.parquet")]), 3000)) > 1


def test_a_folder_of_texts_is_a_document_a_file_sorted_by_name(tmp_path):
    for name, text in {"b.txt": "second", "a.txt": "first", "c/d.md": "third"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert texts_of(tmp_path) == ["first", "second", "third"]


def test_a_linked_file_is_read_as_the_name_of_the_link_says(tmp_path):
    save_gzip(tmp_path / "blob", ["a", "b"])  # as the cache of the Hugging Face hub has it
    (tmp_path / "a.jsonl.gz").symlink_to("blob")
    assert texts_of(tmp_path / "a.jsonl.gz") == ["a", "b"]


def test_linked_folders_are_read_once_and_a_circle_ends(tmp_path):
    for name, text in {"in/a/one.txt": "one", "elsewhere/two.txt": "two"}.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "in" / "linked").symlink_to("../elsewhere")
    (tmp_path / "in" / "again").symlink_to("../elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to("../in")
    assert sorted(texts_of(tmp_path / "in")) == ["one", "two"]


def test_a_folder_that_cannot_be_read_is_an_error_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "open.txt").write_text("open")

    def refused(path, scan=os.scandir):  # permissions do not bind the user of some test machines
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(DataError, match=r"cannot read the folder .*/closed \(Permission denied\)"):
        find_files([str(tmp_path)])


CODE = {
    "a.py": "a", "B.PY": "b", "data.csv": "no", "docs/guide.pdf": "no", "docs/guide.md": "guide",
    "lib/build/gen.py": "gen", "lib/x.py": "x", "settings.json": "{\n}", "build/out.py": "out",
}  # fmt: skip


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        (
            [],
            ["*.csv", "*.pdf", "*.json"],
            "B.PY a.py build/out.py docs/guide.md lib/build/gen.py lib/x.py",
        ),
        (["*.py"], [], "a.py build/out.py lib/build/gen.py lib/x.py"),
        (["*.py", "*.md"], ["build"], "a.py docs/guide.md lib/x.py"),
        (["*.py"], ["build/"], "a.py lib/x.py"),
        (["*.py"], ["build/*", "x.py"], "a.py lib/build/gen.py"),
        (["*.py"], ["./build/*", "*/build/*"], "a.py lib/x.py"),
        (["lib/*"], [], "lib/build/gen.py lib/x.py"),
        (["lib/", "[ab].py"], [], "a.py lib/build/gen.py lib/x.py"),
        (["*"], ["docs", "*.csv", "*.json", "lib/*.py"], "B.PY a.py build/out.py"),
    ],
)
def test_patterns_choose_the_files_of_a_folder(tmp_path, include, exclude, left):
    for name, text in CODE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    choice = FileChoice(tuple(include), tuple(exclude))
    assert sorted(piece.key for piece in find_files([str(tmp_path)], choice)) == left.split()


def test_a_folder_that_is_left_out_is_not_looked_into(tmp_path, monkeypatch):
    for name in ("a.txt", "closed/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")

    def refused(path, scan=os.scandir):
        assert not str(path).endswith("closed")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    assert len(find_files([str(tmp_path)], FileChoice(exclude=("closed",)))) == 1


def test_a_choice_that_leaves_nothing_or_is_of_no_folder_is_refused(tmp_path):
    (tmp_path / "a.py").write_text("text")
    with pytest.raises(
        DataError, match=r"no files that --include '\*\.c' takes and --exclude b leaves"
    ):
        find_files([str(tmp_path)], FileChoice(("*.c",), ("b",)))
    with pytest.raises(
        DataError, match=r"--exclude '\*\.c' chooses among the files of folders, but .* are not"
    ):
        find_files([str(tmp_path / "a.py")], FileChoice(exclude=("*.c",)))
    (tmp_path / "c.py").write_text("more")
    named = str(tmp_path / "a.py")
    pieces = find_files([named, str(tmp_path)], FileChoice(exclude=("a.*", "b")))
    assert [piece.key for piece in pieces] == ["a.py", "c.py"]  # what is named is read


def test_files_of_the_standard_library_can_be_left_out():
    every = {piece.key for piece in find_files(["stdlib"])}
    left = {piece.key for piece in find_files(["stdlib"], FileChoice(exclude=("json", "ast.py")))}
    assert every - left == {name for name in every if name.startswith("json/")} | {"ast.py"}


def test_an_arrow_file_hides_no_other_texts_but_what_datasets_saves_beside_it(tmp_path):
    save_arrow(tmp_path / "a.arrow", ["from arrow"])
    (tmp_path / "b.jsonl").write_text('{"text": "from jsonl"}\n')
    for name in ("dataset_info.json", "state.json", "dataset_dict.json"):
        (tmp_path / name).write_text("{}")
    assert texts_of(tmp_path) == ["from arrow", "from jsonl"]


def save_bad(path, lines: list[bytes]) -> None:
    good = json.dumps({"text": "a good document " * 30}).encode()
    path.write_bytes(b"\n".join([good, *lines, good]) + b"\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        pytest.param(b'{"text": "\xff\xfe"}', "is not UTF-8", id="not UTF-8"),
        pytest.param(b'{"text": ""}', "is empty", id="empty"),
        pytest.param(b'{"words": "x"}', "has no text under the key 'text'", id="no text"),
        pytest.param(b'{"text": "x"', "is not JSON", id="not JSON"),
        pytest.param(b'{"a": ' + b"[" * 200_000, "is nested too deeply", id="nested"),
        pytest.param(b'{"text": "\\ud800"}', "is not Unicode", id="half a surrogate pair"),
    ],
)
def test_a_bad_document_is_an_error_with_file_and_line_or_skipped_and_counted(
    prepared, tmp_path, line, message
):
    save_bad(tmp_path / "bad.jsonl", [line])
    tokenizer = str(prepared / "tokenizer.json")
    settings = {"tokenizer": tokenizer, "num_processes": 1}
    changes = {"validation_fraction": 1e-9}
    with pytest.raises(DataError, match=rf"bad\.jsonl, line 2: the document {message}"):
        prepare([str(tmp_path / "bad.jsonl")], tmp_path / "set", options(**changes), **settings)
    changes["validation_fraction"] = 0.5
    save_bad(tmp_path / "bad.jsonl", [line] + [b'{"text": "other %d"}' % n for n in range(20)])
    prepare([str(tmp_path / "bad.jsonl")], tmp_path / "skip",
            options(bad_documents="skip", **changes), **settings)  # fmt: skip
    splits = [load_manifest(tmp_path / "skip" / split) for split in ("train", "validation")]
    assert sum(manifest.num_skipped for manifest in splits) == 1
    assert sum(manifest.num_documents for manifest in splits) == 22


def test_the_advice_of_a_bad_document_is_taken_where_the_error_left_off(prepared, tmp_path):
    """Partitions that were done while bad documents were errors have none."""
    source, tokenizer = tmp_path / "long.jsonl", str(prepared / "tokenizer.json")
    fine = [b'{"text": "%s %d"}' % (b"fine " * 40, n) for n in range(6000)]
    source.write_bytes(b"\n".join([*fine, b"oops"]) + b"\n")
    settings = {"tokenizer": tokenizer, "num_processes": 1}
    changes = {"validation_fraction": 0.0, "partition_mib": 1}
    with pytest.raises(DataError, match="--bad-documents skip"):
        prepare([str(source)], tmp_path / "set", options(**changes), **settings)
    with pytest.raises(DataError, match=r"another request \(--sequence-length: 16 -> 8; "):
        prepare([str(source)], tmp_path / "set", options(sequence_length=8), **settings)
    changes["bad_documents"], progress = "skip", mock.MagicMock()
    for name in ("set", "fresh"):
        prepare([str(source)], tmp_path / name, options(**changes), progress=progress, **settings)
    assert progress.say.mock_calls == [mock.call("continuing: 1 of 2 parts done")]
    found = [(tmp_path / name / "train/manifest.json").read_text() for name in ("set", "fresh")]
    assert found[0] == found[1] and load_manifest(tmp_path / "set/train").num_skipped == 1
    changes["bad_documents"] = "error"
    with pytest.raises(DataError, match="--bad-documents: skip -> error"):
        prepare([str(source)], tmp_path / "set", options(**changes), **settings)


def test_a_parquet_text_that_is_not_utf_8_is_a_bad_document(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    column = arrow.array([b"good", b"bad \xff", None, b"good too"], arrow.binary())
    table = arrow.table({"text": column.view(arrow.string())})
    parquet.write_table(table, tmp_path / "bad.parquet")
    (piece,) = find_files([str(tmp_path / "bad.parquet")])
    documents = list(documents_of(piece, text_key="text"))
    assert [document.text for document in documents] == ["good", "", "", "good too"]
    assert documents[1].where.endswith("bad.parquet, row group 0, row 1")
    assert documents[1].problem == "is not UTF-8 (byte 4 of the text)"
    assert str(documents[2].problem).startswith("has no text")


def test_a_damaged_parquet_file_is_an_error_before_and_after_it_is_cut(tmp_path):
    save_parquet(tmp_path / "cut.parquet", ["some text"] * 200)
    rewritten = (tmp_path / "cut.parquet").read_bytes()[:-100]
    (tmp_path / "cut.parquet").write_bytes(rewritten)
    for partition_bytes in (10, 1 << 20):
        with pytest.raises(DataError, match=r"cut\.parquet is not a readable parquet file"):
            texts_of(tmp_path / "cut.parquet", partition_bytes=partition_bytes)


def test_the_line_of_a_bad_document_is_right_in_a_later_partition(tmp_path):
    save_bad(tmp_path / "bad.jsonl", [b'{"text": "fine"}'] * 500 + [b"oops"])
    partitions = partitions_of(find_files([str(tmp_path / "bad.jsonl")]), 2000)
    last = [doc for part in partitions for piece in part.pieces
            for doc in documents_of(piece, text_key="text") if doc.problem]  # fmt: skip
    assert [document.where.split(", ")[-1] for document in last] == ["line 502"]


@pytest.mark.parametrize("count", [1, 2])
def test_text_files_that_fall_into_one_split_are_refused_before_any_work(tmp_path, count):
    for number in range(count):
        (tmp_path / f"{number}.txt").write_text("a text " * 1000)
    with pytest.raises(
        DataError, match=rf"all {count} of .* to the train split; set --validation-fraction 0"
    ):
        prepare([str(tmp_path)], tmp_path / "set", options(validation_fraction=1e-9))
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("bad_documents", ["error", "skip"])
def test_a_wrong_text_key_is_named_with_the_keys_there_are(tmp_path, bad_documents):
    path = tmp_path / "a.jsonl"
    path.write_text('{"url": "x", "body": "a text"}\n' * 100)
    with pytest.raises(
        DataError,
        match=r"a\.jsonl, line 1.*under the key 'text' \(set --text-key\), it has the keys 'url', 'body'",
    ):
        prepare([str(path)], tmp_path / "set", options(bad_documents=bad_documents))


def test_a_file_that_is_not_text_is_named(prepared, tmp_path):
    (tmp_path / "image.txt").write_bytes(b"line\n\x89PNG\xff")
    with pytest.raises(DataError, match=r"image\.txt: the document is not UTF-8 \(line 2"):
        prepare([str(tmp_path / "image.txt")], tmp_path / "set", options(validation_fraction=0.0),
                tokenizer=str(prepared / "tokenizer.json"), num_processes=1)  # fmt: skip


def test_sources_that_hold_nothing_are_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        find_files([str(tmp_path / "nothing")])
    with pytest.raises(DataError, match="holds no files"):
        find_files([str(tmp_path)])
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match="hold no text"):
        find_files([str(tmp_path)])


def test_a_wrong_column_names_those_there_are(tmp_path):
    save_parquet(tmp_path / "a.parquet", ["x"])
    with pytest.raises(DataError, match="no column 'body', only text"):
        texts_of(tmp_path / "a.parquet", text_key="body")


def test_a_text_key_beside_text_files_alone_is_refused(tmp_path):
    for name in "abcdefgh":
        (tmp_path / f"{name}.txt").write_text("words")
    with pytest.raises(DataError, match="--text-key body names a key or column"):
        prepare([str(tmp_path)], tmp_path / "set", options(text_key="body"))
    (tmp_path / "i.jsonl").write_text('{"text": "a record"}\n')
    with pytest.raises(DataError, match="no text under the key 'body'"):
        prepare([str(tmp_path)], tmp_path / "set", options(text_key="body"), num_processes=1)


def test_a_long_document_is_encoded_in_pieces_to_the_same_tokens(prepared):
    text = "".join(f"{number} {'abcdefghij'[number % 10]}\n" for number in range(200_000))
    pieces = list(pieces_of(text))
    assert len(pieces) > 1
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= PIECE_CHARACTERS
    tokenizer = Tokenizer(prepared / "tokenizer.json")
    together = np.concatenate(tokenizer.encode_pieces(pieces))
    assert np.array_equal(together, tokenizer.encode_pieces([text])[0])


def test_the_vocabulary_decides_the_stored_type():
    assert options(vocab_size=65536).dtype == "uint16"  # its mask id is 65535
    assert options(vocab_size=65537).dtype == "uint32"


def rows(folder) -> np.ndarray:
    reader = ValidationReader(folder, sequence_length=SEQUENCE_LENGTH, vocab_size=VOCAB_SIZE)
    return reader.read(range(reader.num_rows)).tokens


def prepare_folder(source, out, tokenizer, num_processes) -> None:
    settings = options(partition_mib=1)
    prepare([source], out, settings, tokenizer=tokenizer, num_processes=num_processes)


def write_many(folder) -> None:
    folder.mkdir()
    for number in range(4):
        write_corpus(folder / f"{number}.jsonl", num_documents=5000, seed=number)


@pytest.mark.slow
def test_rows_do_not_depend_on_the_number_of_processes_nor_on_being_killed(prepared, tmp_path):
    write_many(tmp_path / "texts")
    source, tokenizer = str(tmp_path / "texts"), str(prepared / "tokenizer.json")
    prepare_folder(source, tmp_path / "one", tokenizer, 1)
    prepare_folder(source, tmp_path / "two", tokenizer, 2)
    arguments = (source, tmp_path / "killed", tokenizer, 1)
    process = multiprocessing.get_context("spawn").Process(target=prepare_folder, args=arguments)
    process.start()
    deadline = time.monotonic() + 60
    while not list((tmp_path / "killed").glob("work/part-00001*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "killed" / "train").exists()
    finished = {
        path: path.stat().st_mtime_ns for path in tmp_path.glob("killed/work/part-*/part.json")
    }
    assert finished
    prepare_folder(*arguments)
    for split in ("train", "validation"):
        expected = rows(tmp_path / "one" / split)
        assert np.array_equal(rows(tmp_path / "two" / split), expected)
        assert np.array_equal(rows(tmp_path / "killed" / split), expected)


def test_an_interruption_says_that_the_same_command_continues(
    prepared, corpus, tmp_path, monkeypatch
):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(workers, "write_partition", interrupted)
    said = io.StringIO()
    arguments = {"tokenizer": str(prepared / "tokenizer.json"), "num_processes": 1}
    with pytest.raises(KeyboardInterrupt):
        prepare(
            [str(corpus)], tmp_path / "set", options(), progress=Progress(stream=said), **arguments
        )
    assert "the same command continues" in said.getvalue()
    monkeypatch.undo()
    prepare([str(corpus)], tmp_path / "set", options(), **arguments)
    assert np.array_equal(rows(tmp_path / "set" / "train"), rows(prepared / "train"))


@pytest.mark.parametrize(
    ("name", "save"),
    [("a.jsonl", None), ("a.jsonl.gz", save_gzip), ("a.jsonl.zst", save_zstandard),
     ("a.parquet", save_parquet), ("a.arrow", save_arrow)],
)  # fmt: skip
def test_progress_counts_the_bytes_of_files_as_they_are_stored(
    prepared, tmp_path, monkeypatch, name, save
):
    plain = tmp_path / ("a.jsonl" if save is None else "plain.jsonl")
    texts = write_corpus(plain, num_documents=10_000)
    if save is not None:
        save(tmp_path / name, texts)
    reports = []
    monkeypatch.setattr(partition, "BATCH_CHARACTERS", 20_000)
    monkeypatch.setattr(Progress, "add", lambda self, *done: reports.append(done))
    progress = Progress(stream=io.StringIO())
    prepare([str(tmp_path / name)], tmp_path / "set", options(partition_mib=100), num_processes=1,
            tokenizer=str(prepared / "tokenizer.json"), progress=progress)  # fmt: skip
    read, tokens = np.cumsum(reports, axis=0).T
    assert progress.total_bytes == read[-1] == (tmp_path / name).stat().st_size
    middle = read[np.searchsorted(tokens, tokens[-1] // 2)] / read[-1]
    assert 0.3 < middle < 0.7, middle


def test_an_output_without_permission_or_space_is_named(prepared, corpus, tmp_path, monkeypatch):
    def full(*arguments, **settings):
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr(partition, "RowWriter", full)
    with pytest.raises(DataError, match=r"No space left on device.*the disk is full"):
        prepare([str(corpus)], tmp_path / "set", options(),
                tokenizer=str(prepared / "tokenizer.json"), num_processes=1)  # fmt: skip


def test_a_tokenizer_of_another_size_is_refused_with_both_numbers(prepared, corpus, tmp_path):
    with pytest.raises(DataError, match=r"--vocab-size=512.* has 299 tokens .*--vocab-size=300"):
        prepare([str(corpus)], tmp_path / "set", options(vocab_size=512),
                tokenizer=str(prepared / "tokenizer.json"), num_processes=1)  # fmt: skip


def test_a_tokenizer_folder_without_one_is_refused_before_any_work(corpus, tmp_path):
    with pytest.raises(DataError, match=r"--tokenizer .* is a folder without a tokenizer\.json"):
        prepare([str(corpus)], tmp_path / "set", options(), tokenizer=str(corpus.parent))
    assert not (tmp_path / "set").exists()


def test_a_file_name_need_not_be_utf_8(prepared, tmp_path):
    (tmp_path / "in").mkdir()
    write_corpus(tmp_path / "in" / os.fsdecode(b"caf\xe9.jsonl"), num_documents=50)
    prepare([str(tmp_path / "in")], tmp_path / "set", options(), num_processes=1,
            tokenizer=str(prepared / "tokenizer.json"))  # fmt: skip
    assert load_manifest(tmp_path / "set" / "train").num_documents > 30


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("hf:some/set", ("some/set", None, "train")),
        ("hf:some/set:test", ("some/set", None, "test")),
        ("hf:some/set@small-1.0:test", ("some/set", "small-1.0", "test")),
    ],
)
def test_a_source_of_the_hub_names_data_set_configuration_and_split(
    tmp_path, monkeypatch, source, asked
):
    save_arrow(tmp_path / "set.arrow", ["from the hub"])
    calls = []

    def load_dataset(name, configuration, split):
        calls.append((name, configuration, split))
        return types.SimpleNamespace(cache_files=[{"filename": str(tmp_path / "set.arrow")}])

    stand_in: Any = types.ModuleType("datasets")
    stand_in.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    assert texts_of(source) == ["from the hub"]
    assert calls == [asked]


@pytest.mark.parametrize("split", ["train[:10%]", "train+test"])
def test_a_part_of_a_hub_split_is_refused_as_whole_files_are_read(split):
    with pytest.raises(DataError, match="whole split"):
        find_files([f"hf:some/set:{split}"])


def test_a_partition_of_no_size_is_refused():
    with pytest.raises(DataError, match="--partition-mib -1"):
        check_options(options(partition_mib=-1))


def test_ids_of_a_vocabulary_with_gaps_are_words(tmp_path):
    vocabulary = {"<|endoftext|>": 0, "a": 1, "b": 2, "Z": 1000}
    Core(models.WordLevel(vocabulary, unk_token="a")).save(str(tmp_path / "t.json"))
    tokenizer = Tokenizer(tmp_path / "t.json")
    assert tokenizer.vocab_size == 1002
    assert tokenizer.decode([1, 1000, 500, tokenizer.mask_id, 2]) == "a Z\u2591\u2591b"
