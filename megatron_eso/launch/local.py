"""Start the ranks of a command that does not train and so has nothing to save or restart.

Training goes through launch/supervisor.py.
"""

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO

from megatron_eso.launch.environment import local_environment
from megatron_eso.launch.processes import adopt_orphans, free_port, kill_session, reap
from megatron_eso.launch.starter import Starter, can_be_warm, threads_of_each

_SECONDS_TO_SAY_SO_TOO = 2.0  # all ranks usually find the same error, a moment apart


def start_ranks(
    number: int,
    arguments: Sequence[str],
    preload: Sequence[str],
    *,
    module: str = "megatron_eso",
    is_warm: bool | None = None,
) -> int:
    """Run ``python -m MODULE ARGUMENTS`` on ``number`` ranks; return the exit code.

    If one rank fails, or this process is interrupted, all are ended. The first rank speaks for all:
    the standard error of the others is shown only if the first rank did not fail by itself.

    Args:
        number: number of ranks.
        arguments: arguments of the command.
        preload: modules that take long to import; forked ranks share them.
        module: module that each rank runs.
        is_warm: fork ranks from one process that has imported ``preload``; None: where this is possible.
    """
    adopt_orphans()
    base = {**os.environ, **threads_of_each(number)}
    port = free_port()
    with contextlib.ExitStack() as files:
        said = [files.enter_context(tempfile.TemporaryFile()) for _ in range(number - 1)]
        starter = Starter(
            arguments, [file.fileno() for file in said], base,
            is_warm=can_be_warm() if is_warm is None else is_warm, module=module, preload=preload,
        )  # fmt: skip
        ranks: list[int] = []
        try:
            for rank in range(number):
                environment = {**base, **local_environment(rank, number, port)}
                ranks.append(starter.start(environment, said[rank - 1].fileno() if rank else None))
            codes = _wait(ranks)
        finally:
            starter.close()
            for pid in ranks:
                kill_session(pid)
            reap(wait_seconds=5.0)
        if codes.get(ranks[0], -1) <= 0:  # it succeeded, or was ended for another rank's fault
            _show(said)
    failed = next((code for code in codes.values() if code), 0)
    return failed if failed >= 0 else 128 - failed


def _wait(ranks: Sequence[int]) -> dict[int, int]:
    """Wait until all ranks have ended, or one has failed and the first had time to report its failure.

    Returns:
        Exit codes of the ranks that have ended; the first to fail comes before later ones.
    """
    codes: dict[int, int] = {}
    deadline = float("inf")
    while len(codes) < len(ranks) and time.monotonic() < deadline:
        codes |= {pid: code for pid, code in reap().items() if pid in ranks}
        if any(codes.values()):
            if ranks[0] in codes:
                break
            deadline = min(deadline, time.monotonic() + _SECONDS_TO_SAY_SO_TOO)
        time.sleep(0.02)
    return codes


def _show(said: Sequence[IO[bytes]]) -> None:
    """Print what ranks wrote to standard error, identical text only once."""
    shown = set()
    for file in said:
        file.seek(0)
        text = file.read().decode(errors="replace")
        if text not in shown:
            sys.stderr.write(text)
        shown.add(text)
