"""Start the ranks of a command that does not train: nothing to save, nothing to restart.

Training goes through launch/supervisor.py.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO

from megatron_eso.launch.processes import free_port

_SECONDS_TO_SAY_SO_TOO = 2.0  # what one rank finds wrong, all usually do, a moment apart


def start_ranks(number: int, arguments: list[str]) -> int:
    """Run ``python -m megatron_eso ARGUMENTS`` on ``number`` ranks; return the exit code.

    If one rank fails, or this process is interrupted, all are ended. The first rank speaks for all:
    what others wrote to standard error is shown only if the first did not fail itself.
    """
    port = free_port()
    threads = max((os.cpu_count() or 1) // number, 1)
    with contextlib.ExitStack() as files:
        said = [files.enter_context(tempfile.TemporaryFile()) for _ in range(number - 1)]
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "megatron_eso", *arguments],
                env={
                    "OMP_NUM_THREADS": str(threads),
                    **os.environ,
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(number),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                },
                stderr=said[rank - 1] if rank else None,
            )
            for rank in range(number)
        ]
        try:
            code = _first_failure(ranks)
            if code:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    ranks[0].wait(_SECONDS_TO_SAY_SO_TOO)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        if ranks[0].returncode <= 0:  # well, or ended for another's fault
            _show(said)
    return code if code >= 0 else 128 - code


def _first_failure(ranks: list[subprocess.Popen]) -> int:
    """Wait until a rank has failed, or all have ended; return the exit code."""
    while True:
        codes = [process.poll() for process in ranks]
        failed = [code for code in codes if code]
        if failed or None not in codes:
            return failed[0] if failed else 0
        time.sleep(0.05)


def _show(said: Sequence[IO[bytes]]) -> None:
    """Write what ranks wrote to standard error, the same words once."""
    shown = set()
    for file in said:
        file.seek(0)
        text = file.read().decode(errors="replace")
        if text not in shown:
            sys.stderr.write(text)
        shown.add(text)
