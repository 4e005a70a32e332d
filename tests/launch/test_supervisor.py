"""What the launcher says and writes, with ranks that end at once."""

import os
import platform
import subprocess
import sys
from pathlib import Path

from megatron_eso.launch import lease, supervisor
from megatron_eso.launch.heartbeat import Beat
from megatron_eso.launch.said import VARIABLE, Said, is_first_to_say
from megatron_eso.launch.supervisor import Supervision, supervise

SUPERVISED = (
    "from pathlib import Path\n"
    "from megatron_eso.launch.supervisor import Supervision, supervise\n"
    "raise SystemExit(supervise(Supervision(\n"
    "    arguments=[], num_ranks=1, run=Path('run'), module='crash', max_restarts=2)))\n"
)


def run_of_crashes(folder):
    """Supervise a rank that ends with exit code 1; return what the launcher says of each restart."""
    (folder / "crash.py").write_text("raise SystemExit(1)\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", SUPERVISED],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 7, done.stderr
    return [line.split("; ", 1)[1] for line in done.stderr.splitlines() if "; " in line]


def test_a_restart_names_the_checkpoint_that_it_continues_from(tmp_path):
    """Also if the ranks died before they had looked for one."""
    for step in (8, 12):
        folder = tmp_path / f"run/checkpoints/step_{step:010d}"
        folder.mkdir(parents=True)
        (folder / "COMMITTED").touch()
    (tmp_path / "run/checkpoints/step_0000000014").mkdir()  # a save that did not end
    again, given_up = run_of_crashes(tmp_path)
    assert again == "starting again (newest checkpoint: step 12)"
    assert "without a newer checkpoint than step 12 (" in given_up


def test_a_restart_names_no_checkpoint_where_there_is_none(tmp_path):
    again, given_up = run_of_crashes(tmp_path)
    assert again == "starting again"
    assert "given up after 2 faults in a row without a checkpoint (" in given_up


def test_a_launcher_that_is_refused_leaves_no_event(tmp_path, monkeypatch, capsys):
    """It would cut the account of the run that is at work."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    living = subprocess.Popen(["sleep", "60"])
    start = Path(f"/proc/{living.pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    owner = f"{platform.node()}/{living.pid}/{start}"
    try:
        lease.acquire(tmp_path / "checkpoints", owner)
        assert supervise(Supervision(arguments=[], num_ranks=1, run=tmp_path)) == 4
    finally:
        living.kill()
        living.wait()
    assert f"{owner} holds the lease" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    assert lease.read(tmp_path / "checkpoints")["owner"] == owner


def test_a_restart_gets_what_lets_it_go_on_once_there_is_a_checkpoint_of_its_own(tmp_path):
    (tmp_path / "rank.py").write_text(
        "import os, sys\n"
        "from megatron_eso.launch.heartbeat import Heart\n"
        "heart = Heart(os.environ, setup_seconds=9, floor_seconds=1, factor=2)\n"
        "with open('arguments', 'a') as file: print(*sys.argv[1:], file=file)\n"
        "if len(open('arguments').readlines()) > 1: heart.kept_step = 4\n"
        "heart.enter('step')\n"
        "raise SystemExit(1)\n"
    )
    code = SUPERVISED.replace("arguments=[]", "arguments=['a'], arguments_to_go_on=('b',)")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code.replace("'crash'", "'rank'")], cwd=tmp_path, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 7, done.stderr
    assert (tmp_path / "arguments").read_text().splitlines() == ["a", "a", "a b", "a b"]


REFUSED = """
import os
from megatron_eso.cli import main
from megatron_eso.errors import ConfigError

def app(**settings):
    raise ConfigError("no such data" if os.environ["RANK"] != "1" else "my disk is full")

main.app = app
main.main()
"""


def test_an_error_that_several_ranks_find_is_said_once(tmp_path):
    (tmp_path / "refused.py").write_text(REFUSED)
    done = subprocess.run(
        [sys.executable, "-c", SUPERVISED.replace("'crash'", "'refused'").replace("=1,", "=3,")],
        cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert sorted(done.stderr.splitlines()) == ["error: my disk is full", "error: no such data"]


def test_what_was_said_is_remembered_for_one_start(tmp_path):
    said = Said()
    environ = said.file.environment
    assert [is_first_to_say(text, environ) for text in ("a", "b", "a", "ab")] == [1, 1, 0, 1]
    said.clear()
    assert is_first_to_say("a", environ)
    damaged = "a name \ud800 of a file of JSON"  # no text in UTF-8
    assert [is_first_to_say(damaged, environ) for _ in range(2)] == [1, 0]
    with open(
        tmp_path / "file", "w+"
    ) as other:  # the descriptor of another file, as of a nested command
        wrong = {VARIABLE: f"{other.fileno()}:{environ[VARIABLE].split(':')[1]}"}
        assert is_first_to_say("a", wrong) and is_first_to_say("a", wrong)
        assert not Path(tmp_path / "file").read_text()
    said.file.close()
    for unset in ({}, {VARIABLE: "x"}, environ):
        assert is_first_to_say("a", unset)


def test_a_hang_is_told_of_the_section_of_the_rank_that_hangs(tmp_path, monkeypatch):
    """Others wait for it: the limit of one of them may be the first to pass."""
    monkeypatch.setattr(supervisor, "_show_stacks", lambda ranks: None)
    waits = Beat(number=9, section="step", step=4, kept_step=-1, limit_seconds=30.0)
    hangs = Beat(number=8, section="checkpoint", step=3, kept_step=-1, limit_seconds=1800.0)
    ranks = [
        supervisor._Rank(pid=os.getpid(), number=0, beat=waits, silent_seconds=31.0),
        supervisor._Rank(pid=os.getpid(), number=1, beat=hangs, silent_seconds=45.0),
    ]
    ending = supervisor._hung(Supervision(arguments=[], num_ranks=2, run=tmp_path), ranks)
    assert ending is not None and ending.rank == 1
    assert "rank 1 shows no progress in section 'checkpoint' after 45 s" in ending.why
    assert "rank 0 waits in section 'step', limit 30 s" in ending.why
