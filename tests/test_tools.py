"""The tools say what is wrong with their arguments, and reuse only results of the same settings."""

import ast
import errno
import json
import sys
from pathlib import Path

import pytest

from megatron_eso.data.tokenizer import Tokenizer
from tools import (
    bench_data,
    bench_launch,
    bench_planner,
    config_docs,
    cpu_profile,
    numerics,
    numerics_positions,
)


@pytest.mark.parametrize(
    ("main", "words", "message"),
    [
        (cpu_profile.main, ["--ranks", "0"], "--ranks: 0 must be at least 1"),
        (bench_planner.main, ["folder", "--cluster", "nonsense"], "'nonsense' is neither a file"),
        (bench_launch.main, ["--repeats", "0"], "--repeats: 0 must be at least 1"),
        (config_docs.main, ["--hlp"], "unrecognized arguments: --hlp"),
        (numerics_positions.main, ["--text", "/nope"], "/nope cannot be read as text"),
        (numerics.main, ["--text", "/nope"], "/nope cannot be read as text"),
        (numerics.main, ["--text", __file__, "--seeds", "0"], "--seeds: 0 must be at least 1"),
        (numerics.main, ["--text", __file__, "--jobs", "x"], "--jobs: invalid at_least_1 value"),
    ],
)
def test_a_wrong_argument_is_a_message(main, words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tool", *words])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert message in capsys.readouterr().err


def test_a_part_that_is_none_is_refused_by_name(capsys):
    assert bench_data._parts([]) == [] and bench_data._parts(["order"]) == ["order"]
    with pytest.raises(SystemExit, match="2"):
        bench_data._parts(["ordre"])
    assert "'ordre' is none of reading, preparing" in capsys.readouterr().err


def test_scores_of_other_overrides_are_not_taken(tmp_path, monkeypatch):
    done = []

    def stand_in(*words):
        done.append(words)
        if "--json" in words:
            Path(words[-1]).parent.mkdir(parents=True, exist_ok=True)
            Path(words[-1]).write_text("[]")

    monkeypatch.setattr(numerics, "command", stand_in)
    numerics.write_character_tokenizer(["a"], tmp_path / "tokenizer.json")
    for overrides, runs in (([], 1), ([], 1), (["train.steps=7"], 2), (["train.steps=7"], 2)):
        numerics.run_cell("AR", 1, tmp_path, overrides)
        assert sum(words[0] == "train" for words in done) == runs


def test_any_text_is_trained_with_its_own_vocabulary_and_scored_on_the_rows_asked_for(
    tmp_path, monkeypatch
):
    done, name, out = [], "Eso-LM, alpha_0 = 0.5", tmp_path / "out"

    def stand_in(*words):
        done.append(words)
        if "--json" in words:
            bound = {"metric": "likelihood bound, K = 1", "nats_per_token": 1.5}
            score = {**bound, "num_rows": words[words.index("--rows") + 1]}
            words[-1].parent.mkdir(parents=True, exist_ok=True)
            words[-1].write_text(json.dumps([score]))

    monkeypatch.setattr(numerics, "command", stand_in)
    monkeypatch.setattr(numerics, "OBJECTIVES", {name: []})
    (tmp_path / "text").write_text("abc def\n" * 9)
    numerics.prepare(tmp_path / "text", out)
    assert (
        numerics.vocabulary(out / "tokenizer.json") == Tokenizer(out / "tokenizer.json").vocab_size
    )
    for overrides, rows in (([], (128, 0)), (["eval.num_rows=9"], (9, 9))):
        done.clear()
        numerics.run_cell(name, 1, out, overrides)
        train, *scored = done
        assert "model.vocab_size=10" in train  # six letters, space, line end, end of document, mask
        assert tuple(words[words.index("--rows") + 1] for words in scored) == rows
        table = numerics.collect(out, 1, overrides)
        assert f"| K = 1, {rows[0]} rows |" in numerics.as_markdown(table)
        assert "| - | 1.500 (0.000) | 1.500 (0.000) |" in numerics.as_markdown(table)


def test_another_text_in_the_same_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(numerics, "command", lambda *words: None)
    for name in ("one", "other"):
        (tmp_path / name).write_text(f"{name} text" * 9)
    numerics.prepare(tmp_path / "one", tmp_path / "out")
    numerics.prepare(tmp_path / "one", tmp_path / "out")
    with pytest.raises(SystemExit, match="another text"):
        numerics.prepare(tmp_path / "other", tmp_path / "out")


@pytest.mark.parametrize(
    "name", sorted(p.stem for p in Path(numerics.__file__).parent.glob("*.py"))
)
def test_a_tool_that_is_a_command_reads_its_options(name):
    """Otherwise --help would run it."""
    text = (Path(numerics.__file__).parent / f"{name}.py").read_text()
    assert ("__main__" in text) == ("ArgumentParser(" in text)


def test_every_option_of_a_tool_has_help():
    silent = [
        f"{path.name}:{call.lineno}"
        for path in Path(numerics.__file__).parent.glob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr == "add_argument"
        and "help" not in [word.arg for word in call.keywords]
    ]
    assert not silent


def test_an_interrupted_write_of_a_table_leaves_the_earlier_one(tmp_path, monkeypatch):
    """A whole earlier table is worth more than a part of the new one."""
    text, out = tmp_path / "text", tmp_path / "out"
    text.write_text("some words " * 9)
    monkeypatch.setattr(numerics, "command", lambda *words: None)
    monkeypatch.setattr(numerics, "run_cell", lambda *words: [])
    monkeypatch.setattr(numerics, "collect", lambda *words: [{"objective": "AR", "scores": {}}])
    monkeypatch.setattr(numerics, "plot", lambda *words: None)
    monkeypatch.setattr(
        sys, "argv", ["tool", "--text", str(text), "--out", str(out), "--seeds", "1"]
    )
    numerics.main()
    before = {name: (out / name).read_text() for name in ("numerics.json", "numerics.md")}
    rename = Path.replace

    def refused(self, target):
        if Path(target).name in before:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", refused)
    monkeypatch.setattr(numerics, "collect", lambda *words: [{"objective": "MDLM", "scores": {}}])
    with pytest.raises(OSError, match=r"No space left.*numerics\.json"):
        numerics.main()
    assert {name: (out / name).read_text() for name in before} == before


def test_a_folder_that_takes_nothing_is_named(tmp_path):
    (tmp_path / "file").write_text("some words " * 9)
    with pytest.raises(SystemExit, match=r"--out .*/file/out cannot be written: Not a directory"):
        numerics.prepare(tmp_path / "file", tmp_path / "file/out")
