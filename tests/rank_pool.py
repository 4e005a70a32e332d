"""Real processes over gloo for tests: a pool of ranks that run functions of tests/rank_jobs.py.

Starting a process costs seconds (imports), so a pool lives for the whole test session. Every job
joins a world of its own and leaves it: gloo keeps three threads per group that wake a hundred times a
second, and groups of finished jobs would slow all later ones down.
"""

import gc
import importlib
import multiprocessing
import os
import sys
import traceback
from typing import Any

from megatron_eso.launch.processes import free_port


class RankPool:
    """``size`` processes that are ranks of one world; folders to look for packages in first, variables."""

    def __init__(self, size: int, *first_on_path: str, **environment: str) -> None:
        self.size, self._first_on_path, self._environment = size, first_on_path, environment
        self._pipes: list[Any] = []
        self._processes: list[Any] = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(theirs, rank, self.size, self._first_on_path, self._environment),
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, job: str, *args: Any, timeout: float = 600.0) -> list[Any]:
        """Return what ``job`` returned on each rank; raise if it failed on any.

        ``job`` is a function of tests/rank_jobs.py, or of another module of tests ("data.jobs.read").
        A rank that dies or exceeds ``timeout`` (s) fails this job only: the next one gets new processes.
        """
        if not self._processes:
            self._start()
        port = free_port()
        for pipe in self._pipes:
            pipe.send((job, args, port))
        replies = []
        for rank, (pipe, process) in enumerate(zip(self._pipes, self._processes, strict=True)):
            try:
                if not pipe.poll(timeout):
                    raise TimeoutError(f"rank {rank} did not finish {job} within {timeout} s")
                replies.append(pipe.recv())
            except (TimeoutError, EOFError, ConnectionError) as error:
                process.join(1)
                code = process.exitcode
                self.close()
                died = f"rank {rank} died in {job} with exit code {code}"
                raise AssertionError(
                    str(error) if isinstance(error, TimeoutError) else died
                ) from error
        failures = [f"rank {r}:\n{value}" for r, (is_ok, value) in enumerate(replies) if not is_ok]
        if failures:
            raise AssertionError(f"{job} failed on\n" + "\n".join(failures))
        return [value for _, value in replies]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._pipes, self._processes = [], []


def _serve(
    pipe: Any, rank: int, size: int, first_on_path: tuple[str, ...], environment: dict[str, str]
) -> None:
    if any(path.endswith("triton") for path in first_on_path):
        import torch._inductor.compile_fx  # looks for triton now, so it does not meet the stand-in
    sys.path[:0] = first_on_path
    os.environ.update(
        environment,
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
    )
    import torch

    torch.set_num_threads(1)
    from megatron_eso.parallel.finish import finish
    from tests import rank_jobs

    while True:
        job, args, port = pipe.recv()
        os.environ["MASTER_PORT"] = str(port)
        try:
            module, _, name = job.rpartition(".")
            jobs = importlib.import_module(f"tests.{module}") if module else rank_jobs
            reply = True, getattr(jobs, name)(*args)
        except BaseException:
            reply = False, traceback.format_exc()
        finish()
        gc.collect()
        pipe.send(reply)
