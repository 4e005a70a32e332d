"""Ranks of one command speak with one voice, but no failure is kept quiet."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# A shell that runs the tests in its background has SIGINT ignored, and so would they.
STARTS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
STARTS += "from megatron_eso.launch.local import start_ranks; raise SystemExit(start_ranks("


@pytest.fixture(params=[False, True], ids=["new", "forked"])
def start(request, tmp_path):
    """Start ranks, each a process of its own or forked from one, that run a few lines of Python."""

    def begin(number, lines):
        (tmp_path / "a_rank.py").write_text(
            f"import os, sys, time\nrank = os.environ['RANK']\n{lines}\n"
        )
        code = f"{STARTS}{number}, ['one', 'two'], ['json'], module='a_rank', is_warm={request.param}))"
        return subprocess.Popen(
            [sys.executable, "-c", code], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"},
        )  # fmt: skip

    return begin


def ended(process):
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_ranks_get_the_command_and_a_world_of_their_own(start):
    lines = (
        "names = ('WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'OMP_NUM_THREADS')\n"
        "sys.stdout.write(' '.join([rank, *sys.argv[1:], *(os.environ[n] for n in names)]) + '\\n')\n"
        "sys.stderr.write(os.environ['MASTER_PORT'])"
    )
    threads = os.environ.get("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // 2, 1)))
    code, out, err = ended(start(2, lines))
    expected = [f"{rank} one two 2 {rank} 127.0.0.1 {threads}" for rank in range(2)]
    assert (code, sorted(out.splitlines())) == (0, expected)
    assert int(err) > 1024  # of both the same, and said once


def test_an_error_that_all_ranks_find_is_said_once(start):
    lines = "print('error: no such file, rank', rank, file=sys.stderr); raise SystemExit(4)"
    assert ended(start(3, lines)) == (4, "", "error: no such file, rank 0\n")


def test_a_rank_that_fails_alone_is_heard_and_ends_the_others(start):
    lines = (
        "if rank == '0': time.sleep(60)\n"
        "print('error: my disk is full', file=sys.stderr); raise SystemExit(3)"
    )
    assert ended(start(3, lines)) == (3, "", "error: my disk is full\n")


def test_a_rank_that_is_killed_fails_the_command(start):
    lines = "os.kill(os.getpid(), 9) if rank == '1' else time.sleep(60)"
    assert ended(start(2, lines)) == (128 + signal.SIGKILL, "", "")


def test_warnings_of_other_ranks_are_not_lost(start):
    lines = "print('a warning', file=sys.stderr) if rank == '1' else None"
    assert ended(start(2, lines)) == (0, "", "a warning\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ranks_end_with_the_command(start, tmp_path, number):
    process = start(2, f"open(f'{tmp_path}/{{rank}}', 'w').write(str(os.getpid())); time.sleep(60)")
    files, deadline = [tmp_path / "0", tmp_path / "1"], time.monotonic() + 60
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    code, _, _ = ended(process)
    assert code in (-number, 128 + number)
    for file in files:
        while Path("/proc", file.read_text()).exists():
            assert time.monotonic() < deadline, "a rank lives on"
            time.sleep(0.02)
