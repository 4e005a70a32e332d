"""Start the ranks of a run on this machine and pass signals on to them."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_GRACE_SECONDS = 120.0


def start_ranks(number: int, arguments: list[str]) -> int:
    """Run ``python -m megatron_eso ARGUMENTS`` on ``number`` ranks; return the exit code.

    A signal goes to every rank, which agree on a step, save and stop. If one rank fails, the others
    are ended, and its exit code is returned.
    """
    port = _free_port()
    threads = max((os.cpu_count() or 1) // number, 1)
    ranks = []
    for rank in range(number):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(number),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        }
        # A session of its own: the terminal's Ctrl-C reaches the ranks through us alone, once.
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-m", "megatron_eso", *arguments],
                env=environment,
                start_new_session=True,
            )
        )

    def forward(number: int, frame: FrameType | None) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        return _wait(ranks)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: list[subprocess.Popen]) -> int:
    while True:
        codes = [process.poll() for process in ranks]
        failed = [code for code in codes if code not in (None, 0)]
        if all(code is not None for code in codes):
            return _exit_code(failed)
        if failed:
            return _end_others(ranks)
        time.sleep(0.1)


def _end_others(ranks: list[subprocess.Popen]) -> int:
    """Wait for the other ranks to end by themselves (an agreed stop), then end them."""
    first = next(process.returncode for process in ranks if process.returncode)
    deadline = time.monotonic() + (_GRACE_SECONDS if first == 75 else 10.0)
    while any(p.poll() is None for p in ranks) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in ranks:
        if process.poll() is None:
            process.kill()
            process.wait()
    return _exit_code([first])


def _exit_code(failed: Sequence[int | None]) -> int:
    if not failed:
        return 0
    code = failed[0] or 0
    return code if code > 0 else 128 - code


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
