"""Ranks of one command speak with one voice, but no failure is kept quiet."""

import sys

import pytest

from megatron_eso.launch.local import start_ranks


@pytest.fixture
def ranks_that_run(tmp_path, monkeypatch):
    """Let every rank run a few lines of shell in the place of this package."""

    def put(lines):
        program = tmp_path / "program"
        program.write_text(f"#!/bin/sh\n{lines}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))

    return put


def test_an_error_that_all_ranks_find_is_said_once(ranks_that_run, capfd):
    ranks_that_run('echo "error: no such file, rank $RANK" >&2; exit 4')
    assert start_ranks(3, []) == 4
    assert capfd.readouterr().err == "error: no such file, rank 0\n"


def test_a_rank_that_fails_alone_is_heard_and_ends_the_others(ranks_that_run, capfd):
    ranks_that_run('[ $RANK = 0 ] && exec sleep 60; echo "error: my disk is full" >&2; exit 3')
    assert start_ranks(3, []) == 3
    assert capfd.readouterr().err == "error: my disk is full\n"


def test_warnings_of_other_ranks_are_not_lost(ranks_that_run, capfd):
    ranks_that_run('[ $RANK = 1 ] && echo "a warning" >&2; exit 0')
    assert start_ranks(2, []) == 0
    assert capfd.readouterr().err == "a warning\n"
