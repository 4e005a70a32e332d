"""A signal that is repeated while a process ends does not turn its exit code into a death."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# A module's globals are taken apart after Python has given up its signal handlers.
LATE = """
import os, signal, sys
class Late:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGUSR1):
        kill(pid, number)
late = Late()
"""
CAUGHT = LATE + "signal.signal(signal.SIGUSR1, lambda *_: None)\n"
IGNORED = CAUGHT + (
    "from megatron_eso.launch.processes import ignore_signals\nignore_signals()\nsys.exit(75)\n"
)
SUPERVISED = LATE + (
    "from pathlib import Path\n"
    "from megatron_eso.launch.supervisor import Supervision, supervise\n"
    "sys.exit(supervise(Supervision(arguments=[], num_ranks=1, run=Path('run'), module='this')))\n"
)


def run(program, folder):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True
    ).returncode


def test_python_gives_up_its_handlers_before_the_end(tmp_path):
    """When this fails, ignore_signals is not needed any more."""
    assert run(CAUGHT, tmp_path) == -signal.SIGUSR1


@pytest.mark.parametrize(
    "program, code", [(IGNORED, 75), (SUPERVISED, 0)], ids=["rank", "launcher"]
)
def test_a_process_whose_work_is_done_survives_a_late_signal(tmp_path, program, code):
    assert run(program, tmp_path) == code
