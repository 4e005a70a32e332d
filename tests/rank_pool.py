"""Real processes over gloo for tests: a pool of ranks that run functions of tests/rank_jobs.py.

Starting a process costs seconds (imports), so a pool lives for the whole test session; every job
builds its own process groups of the layout it wants.
"""

import multiprocessing
import os
import socket
import traceback
from typing import Any


class RankPool:
    """``size`` processes that are ranks of one world."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        port = _free_port()
        self.size = size
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, size, port))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, job: str, *args: Any, timeout: float = 240.0) -> list[Any]:
        """Return what ``job`` returned on each rank; raise if it failed on any."""
        for pipe in self._pipes:
            pipe.send((job, args))
        replies = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(timeout):
                self.close()
                raise TimeoutError(f"rank {rank} did not finish {job} within {timeout} s")
            replies.append(pipe.recv())
        failures = [f"rank {r}:\n{value}" for r, (is_ok, value) in enumerate(replies) if not is_ok]
        if failures:
            raise AssertionError(f"{job} failed on\n" + "\n".join(failures))
        return [value for _, value in replies]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()


def _serve(pipe: Any, rank: int, size: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    import torch

    torch.set_num_threads(1)
    from tests import rank_jobs

    while True:
        job, args = pipe.recv()
        try:
            pipe.send((True, getattr(rank_jobs, job)(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
