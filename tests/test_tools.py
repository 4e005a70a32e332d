"""The tools say what is wrong with their arguments, and reuse only results of the same settings."""

import sys
from pathlib import Path

import pytest

from tools import bench_data, bench_planner, cpu_profile, numerics


@pytest.mark.parametrize(
    ("main", "words", "message"),
    [
        (cpu_profile.main, ["--ranks", "0"], "--ranks: 0 must be at least 1"),
        (bench_planner.main, ["folder", "--cluster", "nonsense"], "'nonsense' is neither a file"),
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
    for overrides, runs in (([], 1), ([], 1), (["train.steps=7"], 2), (["train.steps=7"], 2)):
        numerics.run_cell("AR", 1, tmp_path, overrides)
        assert sum(words[0] == "train" for words in done) == runs


def test_another_text_in_the_same_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(numerics, "command", lambda *words: None)
    for name in ("one", "other"):
        (tmp_path / name).write_text(f"{name} text" * 9)
    numerics.prepare(tmp_path / "one", tmp_path / "out")
    numerics.prepare(tmp_path / "one", tmp_path / "out")
    with pytest.raises(SystemExit, match="another text"):
        numerics.prepare(tmp_path / "other", tmp_path / "out")
