"""The data commands as a person types them."""

import shutil

import pytest
from typer.testing import CliRunner

from megatron_eso.cli.data import app
from megatron_eso.errors import DataError
from tests.data.conftest import write_corpus


def run(*arguments) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_prepare_says_what_it_made_and_that_there_is_nothing_to_do(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl")
    arguments = ["prepare", tmp_path / "corpus.jsonl", "--out", tmp_path / "set",
                 "--sequence-length", 16, "--vocab-size", 300, "--processes", 1]  # fmt: skip
    assert "prepared" in run(*arguments)
    assert "nothing to do" in run(*arguments)


def test_a_given_tokenizer_decides_the_vocabulary(prepared, corpus, tmp_path):
    output = run("prepare", corpus, "--out", tmp_path / "set", "--sequence-length", 16,
                 "--tokenizer", prepared / "tokenizer.json", "--processes", 1)  # fmt: skip
    assert "vocabulary 300" in output


def test_inspect_prints_counts_and_text_and_draws(prepared, tmp_path):
    output = run("inspect", prepared / "train", "--row", 1, "--picture", tmp_path / "lengths.png")
    assert "num_documents" in output
    assert "--- row 1 ---" in output
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_verify_accepts_what_prepare_wrote(prepared):
    assert "rows are whole" in run("verify", prepared / "train", prepared / "validation")


def test_verify_names_every_damaged_shard(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "set")
    shard = tmp_path / "set" / "train" / "shard.00000.mds"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match="has 1 faults"):
        run("verify", tmp_path / "set" / "train")
