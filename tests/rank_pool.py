"""Real processes over gloo for tests: a pool of ranks that run functions of tests/rank_jobs.py.

Starting a process costs seconds (imports), so a pool lives for the whole test session, and one process
imports for all: the others are forked from it. Every job joins its own world and leaves it again: gloo
keeps three threads per group that wake a hundred times a second, so groups of finished jobs would slow
down all later ones.
"""

import contextlib
import gc
import importlib
import multiprocessing
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

from megatron_eso.garbage import look_at_new_objects, look_rarely
from megatron_eso.launch.processes import die_with_parent, free_port


class RankPool:
    """``size`` processes that are ranks of one world; folders to look for packages in first, variables."""

    def __init__(self, size: int, *first_on_path: str, **environment: str) -> None:
        self.size, self._first_on_path, self._environment = size, first_on_path, environment
        self._pipes: list[Any] = []
        self._first: Any = None

    def _start(self, module: str) -> None:
        context = multiprocessing.get_context("spawn")
        pairs = [context.Pipe() for _ in range(self.size)]
        theirs = [pair[1] for pair in pairs]
        self._first = context.Process(
            target=_serve, args=(theirs, module, self._first_on_path, self._environment)
        )
        self._first.start()
        for pipe in theirs:
            pipe.close()
        self._pipes = [pair[0] for pair in pairs]

    def run(self, job: str, *args: Any, timeout: float = 600.0) -> list[Any]:
        """Return what ``job`` returned on each rank; raise if it failed on any.

        ``job`` is a function of tests/rank_jobs.py, or of another module of tests ("data.jobs.read").
        A rank that dies or exceeds ``timeout`` (s) fails only this job: the next one gets new processes.
        """
        module, _, name = job.rpartition(".")
        module = f"tests.{module or 'rank_jobs'}"
        if not self._pipes:
            self._start(module)
        port = free_port()
        for pipe in self._pipes:
            pipe.send((module, name, args, port))
        replies = []
        for rank, pipe in enumerate(self._pipes):
            try:
                if not pipe.poll(timeout):
                    raise TimeoutError(f"rank {rank} did not finish {job} within {timeout} s")
                replies.append(pipe.recv())
            except (TimeoutError, EOFError, ConnectionError) as error:
                self.close()
                died = f"rank {rank} died in {job}"
                raise AssertionError(
                    str(error) if isinstance(error, TimeoutError) else died
                ) from error
        failures = [f"rank {r}:\n{value}" for r, (is_ok, value) in enumerate(replies) if not is_ok]
        if failures:
            raise AssertionError(f"{job} failed on\n" + "\n".join(failures))
        return [value for _, value in replies]

    def close(self) -> None:
        """End the processes: the others end with the first."""
        if self._first is not None:
            self._first.kill()
            self._first.join()
        for pipe in self._pipes:
            pipe.close()
        self._first, self._pipes = None, []


def _serve(
    pipes: list[Any], module: str, first_on_path: tuple[str, ...], environment: dict[str, str]
) -> None:
    """Import what the first job needs, fork the other ranks, and serve as the first one."""
    look_rarely()
    _stay_on_one_core()
    if any(path.endswith("triton") for path in first_on_path):
        import torch._inductor.compile_fx  # looks for triton now, so it does not meet the stand-in
    sys.path[:0] = first_on_path
    os.environ.update(environment, WORLD_SIZE=str(len(pipes)), MASTER_ADDR="127.0.0.1")
    import torch
    import torch._dynamo  # which PyTorch's optimizers import when they are made

    torch.set_num_threads(1)
    importlib.import_module(module)
    look_at_new_objects()
    for rank in range(1, len(pipes)):
        arguments = (pipes, rank, os.getpid())
        multiprocessing.get_context("fork").Process(target=_serve_rank, args=arguments).start()
    _serve_rank(pipes, 0)


@contextlib.contextmanager
def _warnings_are_errors() -> Iterator[None]:
    """Make warnings that a user would see, once per rank, fail a job; Python hides others' deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("error", category=DeprecationWarning, module="megatron_eso")
        warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)
        yield


def _stay_on_one_core() -> None:
    """Keep a pool on one core if each worker of pytest-xdist has one.

    A gloo collective is a dozen messages, each of which wakes a thread: a quarter faster on one core.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    cores = sorted(os.sched_getaffinity(0))
    if worker and len(cores) <= int(os.environ["PYTEST_XDIST_WORKER_COUNT"]):
        os.sched_setaffinity(0, {cores[int(worker) % len(cores)]})


def _serve_rank(pipes: list[Any], rank: int, first: int | None = None) -> None:
    if first is not None:
        die_with_parent(first)
    pipe = pipes[rank]
    for other in pipes:  # a rank that dies closes its pipe, if nobody else has it
        if other is not pipe:
            other.close()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    from megatron_eso.parallel.finish import finish

    while True:
        module, name, args, port = pipe.recv()
        os.environ["MASTER_PORT"] = str(port)
        try:
            with _warnings_are_errors():
                reply = True, getattr(importlib.import_module(module), name)(*args)
        except BaseException:
            reply = False, traceback.format_exc()
        finish()
        gc.collect()
        pipe.send(reply)
