"""Preparing data: every document's tokens are there once, and asking twice is safe."""

import gzip
import json
import os
import shutil

import numpy as np
import pytest

from megatron_eso.data.documents import Document
from megatron_eso.data.manifest import load_manifest
from megatron_eso.data.partition import split_of
from megatron_eso.data.prepare import _training_texts, prepare
from megatron_eso.data.reader import ValidationReader
from megatron_eso.data.sources import find_files
from megatron_eso.data.tokenizer import Tokenizer
from megatron_eso.data.workers import write_partitions
from megatron_eso.errors import DataError
from tests.data.conftest import SEQUENCE_LENGTH, VOCAB_SIZE, options, write_corpus


def documents_in(out, split: str) -> list[str]:
    """Return the texts that a split's rows hold, put together again."""
    reader = ValidationReader(
        str(out / split), sequence_length=SEQUENCE_LENGTH, vocab_size=VOCAB_SIZE
    )
    rows = reader.read(range(reader.num_rows))
    tokens = rows.tokens[:, :-1][rows.is_valid[:, :-1]]
    manifest = reader.manifest
    assert len(tokens) == manifest.num_tokens
    ends = np.flatnonzero(tokens == manifest.end_of_document_id)
    assert len(ends) == manifest.num_documents
    tokenizer = Tokenizer(out / "tokenizer.json")
    return [
        tokenizer.decode(part) for part in np.split(tokens, ends + 1)[:-1] for part in [part[:-1]]
    ]


def test_every_document_comes_out_once_and_whole(corpus, prepared):
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    for split in ("train", "validation"):
        expected = [text for text in texts if split_of(Document(text, "", text), 0.1) == split]
        assert expected
        assert documents_in(prepared, split) == expected


def test_rows_overlap_by_one_token_so_that_every_next_token_is_a_target(prepared):
    reader = ValidationReader(
        str(prepared / "validation"), sequence_length=SEQUENCE_LENGTH, vocab_size=VOCAB_SIZE
    )
    rows = reader.read(range(reader.num_rows)).tokens
    assert np.array_equal(rows[:-1, -1], rows[1:, 0])


def test_separate_packing_starts_every_document_at_a_row(corpus, tmp_path):
    prepare([str(corpus)], tmp_path / "set", options(packing="separate"), num_processes=1)
    assert documents_in(tmp_path / "set", "train") == documents_in_order(corpus, "train")
    reader = ValidationReader(
        str(tmp_path / "set" / "train"), sequence_length=SEQUENCE_LENGTH, vocab_size=VOCAB_SIZE
    )
    rows = reader.read(range(reader.num_rows))
    end = reader.manifest.end_of_document_id
    last = [int(np.flatnonzero(valid)[-1]) for valid in rows.is_valid]
    ends_inside = [
        (row[: stop + 1] == end).sum() for row, stop in zip(rows.tokens, last, strict=True)
    ]
    assert max(ends_inside) == 1


def documents_in_order(corpus, split: str) -> list[str]:
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    return [text for text in texts if split_of(Document(text, "", text), 0.1) == split]


def test_a_second_run_with_the_same_request_does_nothing(corpus, prepared):
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*.*")}
    again = prepare([str(corpus)], prepared, options(), num_processes=1)
    assert again.was_complete
    after = {path: path.stat().st_mtime_ns for path in prepared.rglob("*.*")}
    before.pop(prepared / "prepare.json"), after.pop(prepared / "prepare.json")
    assert before == after


def test_another_request_is_refused_naming_the_difference(corpus, prepared):
    with pytest.raises(DataError, match=r"--sequence-length: 16 -> 32.*--overwrite"):
        prepare([str(corpus)], prepared, options(sequence_length=32), num_processes=1)


def test_overwrite_replaces_what_another_request_left(corpus, prepared, tmp_path):
    out = tmp_path / "set"
    shutil.copytree(prepared, out)
    prepare([str(corpus)], out, options(sequence_length=32), num_processes=1, overwrite=True)
    assert load_manifest(out / "train").sequence_length == 32


def test_overwrite_repairs_damaged_data_of_the_same_request(corpus, prepared, tmp_path):
    out = tmp_path / "set"
    shutil.copytree(prepared, out)
    shard = out / "train" / "shard.00000.mds"
    whole = shard.read_bytes()
    for path in (shard, out / "train" / "manifest.json"):
        path.write_bytes(b"damaged")
    with pytest.raises(DataError, match="prepare the data again, with --overwrite"):
        prepare([str(corpus)], out, options(), num_processes=1)
    assert not prepare([str(corpus)], out, options(), num_processes=1, overwrite=True).was_complete
    assert shard.read_bytes() == whole


def test_a_removed_split_is_made_again_by_the_same_command(corpus, prepared, tmp_path):
    out = tmp_path / "set"
    shutil.copytree(prepared, out)
    shutil.rmtree(out / "validation")
    assert not prepare([str(corpus)], out, options(), num_processes=1).was_complete
    assert documents_in(out, "validation") == documents_in_order(corpus, "validation")
    assert documents_in(out, "train") == documents_in_order(corpus, "train")


def test_a_damaged_request_is_named_and_overwritten_on_demand(corpus, prepared, tmp_path):
    out = tmp_path / "set"
    shutil.copytree(prepared, out)
    (out / "prepare.json").write_bytes(b'{"sources": \xff')
    with pytest.raises(DataError, match=r"holds a damaged prepare\.json.*--overwrite"):
        prepare([str(corpus)], out, options(), num_processes=1)
    prepare([str(corpus)], out, options(), num_processes=1, overwrite=True)
    assert documents_in(out, "train") == documents_in_order(corpus, "train")


def test_a_folder_may_have_a_colon_in_its_name(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare([str(corpus)], "run-12:30", options(), num_processes=1)
    reader = ValidationReader(
        "run-12:30/train", sequence_length=SEQUENCE_LENGTH, vocab_size=VOCAB_SIZE
    )
    assert reader.num_rows


def test_a_second_process_is_refused_while_one_is_at_work(corpus, tmp_path, monkeypatch):
    out, request = tmp_path / "set", ([str(corpus)], tmp_path / "set", options())
    seen = []

    def at_work(*arguments, **settings):
        before = sorted(out.rglob("*"))
        with pytest.raises(
            DataError, match=rf"another `data prepare` \(process {os.getpid()} on .*-n1"
        ):
            prepare(*request, num_processes=1, overwrite=True)
        assert sorted(out.rglob("*")) == before
        seen.append(True)
        return write_partitions(*arguments, **settings)

    monkeypatch.setattr("megatron_eso.data.prepare.write_partitions", at_work)
    prepare(*request, num_processes=1)
    assert seen and not list(out.glob("*.lock"))


def test_the_lock_of_a_process_that_died_holds_nobody_up(corpus, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "prepare.lock").write_text("process 1 on another")
    prepare([str(corpus)], tmp_path / "set", options(), num_processes=1)


def test_a_folder_that_data_prepare_did_not_make_is_left_alone(corpus, tmp_path):
    (tmp_path / "precious.txt").write_text("keep")
    with pytest.raises(DataError, match="not made by data prepare"):
        prepare([str(corpus)], tmp_path, options(), num_processes=1, overwrite=True)
    assert (tmp_path / "precious.txt").read_text() == "keep"


def test_more_vocabulary_than_the_text_can_fill_is_refused(tmp_path):
    write_corpus(tmp_path / "small.jsonl", num_documents=3)
    with pytest.raises(DataError, match=r"--vocab-size 5000 is more than .* set --vocab-size \d+"):
        prepare([str(tmp_path / "small.jsonl")], tmp_path / "set", options(vocab_size=5000))


def training_texts(folder, num_bytes: int) -> list[str]:
    return list(_training_texts(find_files([str(folder)]), options(), num_bytes))


def test_the_text_that_trains_a_tokenizer_is_counted_in_bytes_and_not_cut_by_compression(tmp_path):
    for name in ("plain", "packed"):
        (tmp_path / name).mkdir()
    for number in range(3):
        plain = tmp_path / "plain" / f"{number}.jsonl"
        write_corpus(plain, num_documents=20 * 10**number, seed=number)
        plain.write_text(plain.read_text().replace("a", "ä€"))
        with gzip.open(tmp_path / "packed" / f"{plain.name}.gz", "wb") as file:
            file.write(plain.read_bytes())
    every = training_texts(tmp_path / "plain", 1 << 30)
    size = len("".join(every).encode())
    for num_bytes in (1000, size // 2, 1 << 30):
        texts = training_texts(tmp_path / "packed", num_bytes)
        assert texts == training_texts(tmp_path / "plain", num_bytes)
        used = len("".join(texts).encode())
        assert min(num_bytes, size) - 12 <= used <= num_bytes
    assert every == training_texts(tmp_path / "plain", 3 * size)


def test_an_end_token_that_stands_in_a_text_does_not_end_the_document(prepared, tmp_path):
    texts = [f"{number} before<|endoftext|>after" for number in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    prepare([str(tmp_path / "a.jsonl")], tmp_path / "set", options(validation_fraction=0.0),
            tokenizer=str(prepared / "tokenizer.json"), num_processes=1)  # fmt: skip
    assert documents_in(tmp_path / "set", "train") == texts


def test_a_second_run_without_a_validation_split_has_nothing_to_do(prepared, corpus, tmp_path):
    request = [str(corpus)], tmp_path / "set", options(validation_fraction=0.0)
    for is_second in (False, True):
        done = prepare(*request, tokenizer=str(prepared / "tokenizer.json"), num_processes=1)
        assert done.was_complete == is_second and list(done.manifests) == ["train"]
