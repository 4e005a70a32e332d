"""Runs partitions in worker processes; a worker's user error stops the others and is passed on."""

import multiprocessing
import os
import queue
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from megatron_eso.data.partition import Preparation, write_partition
from megatron_eso.data.progress import Progress
from megatron_eso.data.sources import Partition
from megatron_eso.errors import DataError

SECONDS_BETWEEN_REPORTS = 0.5
_reports: Any = None  # set in each worker process by its initializer


def write_partitions(
    partitions: list[Partition],
    preparation: Preparation,
    *,
    num_processes: int,
    progress: Progress | None,
) -> None:
    """Write every partition that an earlier run did not finish.

    Raises:
        DataError: the first error of a worker; finished work is kept.
    """
    left = [one for one in partitions if not preparation.is_finished(one)]
    if progress is not None:
        if len(left) < len(partitions):
            progress.say(
                f"continuing: {len(partitions) - len(left)} of {len(partitions)} parts done"
            )
        progress.begin(sum(partition.num_bytes for partition in left))
    try:
        if num_processes == 1 or len(left) <= 1:
            report = progress.add if progress is not None else _report_nothing
            for partition in left:
                write_partition(partition, preparation, report)
        else:
            _run_pool(left, preparation, num_processes, progress)
    except KeyboardInterrupt:
        if progress is not None:
            progress.say("interrupted: finished parts are kept, the same command continues")
        raise
    if progress is not None:
        progress.finish()


def _run_pool(
    partitions: list[Partition],
    preparation: Preparation,
    num_processes: int,
    progress: Progress | None,
) -> None:
    # Spawned, not forked: threads of the tokenizer and of the training loop do not survive a fork.
    context = multiprocessing.get_context("spawn")
    reports = context.Queue()
    count = min(num_processes, len(partitions))
    with ProcessPoolExecutor(count, context, _start_worker, (reports,)) as pool:
        pending: set[Future[None]] = {
            pool.submit(_work, partition, preparation) for partition in partitions
        }
        try:
            while pending:
                done, pending = wait(pending, SECONDS_BETWEEN_REPORTS, FIRST_COMPLETED)
                _drain(reports, progress)
                for future in done:
                    future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process died (killed, or out of memory); run the same command again, it "
                "continues; fewer --processes need less memory"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(reports: Any) -> None:
    global _reports
    _reports = reports
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per process


def _work(partition: Partition, preparation: Preparation) -> None:
    write_partition(partition, preparation, lambda *done: _reports.put(done))


def _drain(reports: Any, progress: Progress | None) -> None:
    while True:
        try:
            done = reports.get_nowait()
        except queue.Empty:
            return
        if progress is not None:
            progress.add(*done)


def _report_nothing(num_bytes: int, num_tokens: int) -> None:
    del num_bytes, num_tokens
