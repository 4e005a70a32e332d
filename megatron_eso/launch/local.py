"""Start the ranks of a command that does not train: nothing to save, nothing to restart.

Training goes through launch/supervisor.py.
"""

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO

from megatron_eso.launch.processes import adopt_orphans, free_port, kill_session, reap
from megatron_eso.launch.starter import Starter, can_be_warm, threads_of_each

_SECONDS_TO_SAY_SO_TOO = 2.0  # what one rank finds wrong, all usually do, a moment apart


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
    what others wrote to standard error is shown only if the first did not fail itself.

    Args:
        number: how many.
        arguments: of the command.
        preload: modules that take long to import, which ranks share where they can.
        module: what each rank runs.
        is_warm: fork ranks from one process that has imported those; None: where that can be.
    """
    adopt_orphans()
    base = {**os.environ, **threads_of_each(number)}
    world = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with contextlib.ExitStack() as files:
        said = [files.enter_context(tempfile.TemporaryFile()) for _ in range(number - 1)]
        starter = Starter(
            arguments, [file.fileno() for file in said], base,
            is_warm=can_be_warm() if is_warm is None else is_warm, module=module, preload=preload,
        )  # fmt: skip
        ranks: list[int] = []
        try:
            for rank in range(number):
                environment = {**base, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                ranks.append(starter.start(environment, said[rank - 1].fileno() if rank else None))
            codes = _wait(ranks)
        finally:
            starter.close()
            for pid in ranks:
                kill_session(pid)
            reap(wait_seconds=5.0)
        if codes.get(ranks[0], -1) <= 0:  # well, or ended for another's fault
            _show(said)
    failed = next((code for code in codes.values() if code), 0)
    return failed if failed >= 0 else 128 - failed


def _wait(ranks: Sequence[int]) -> dict[int, int]:
    """Wait until all ranks have ended, or one has failed and the first had time to say why it did too.

    Returns:
        Exit codes of those that have ended, the first to fail before others.
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
    """Write what ranks wrote to standard error, the same words once."""
    shown = set()
    for file in said:
        file.seek(0)
        text = file.read().decode(errors="replace")
        if text not in shown:
            sys.stderr.write(text)
        shown.add(text)
