"""Would the exchanges between pipeline stages finish over NCCL? Judged from what ranks did over gloo.

Gloo matches every message by its sender and lets ranks continue immediately. PyTorch's NCCL is stricter:

* two ranks have their own communicator for each group, created when the first of them sends or receives.
  Creating it blocks the process until the other rank does so too;
* operations on a communicator run in the order of issue, so one rank's sends and receives must be in the
  order of the other's receives and sends;
* with CUDA_DEVICE_MAX_CONNECTIONS=1 an operation starts only after everything the rank issued before it;
* capturing a CUDA graph waits for everything that the rank has issued.

:func:`recorded` notes what a rank does; :func:`stuck` runs the notes of all ranks under these rules.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron_eso.eval.evaluate import evaluate
from megatron_eso.model.eso_model import EsoModel
from megatron_eso.parallel.exchange import Rows
from megatron_eso.parallel.optimizer import whole_weights
from megatron_eso.train.step import train_step
from tests import rank_jobs
from tests.replaced import replaced

Note = tuple[str, int, str, int]
"""What (send, receive, wait or capture), number of the exchange, its group, the other rank."""


class _Work:
    """A handle that notes when a rank waits for it."""

    def __init__(self, work: Any, number: int, notes: list[Note]) -> None:
        self._work, self._number, self._notes = work, number, notes

    def wait(self, *args: Any) -> Any:
        self._notes.append(("wait", self._number, "", -1))
        return self._work.wait(*args)


@contextlib.contextmanager
def recorded() -> Iterator[list[Note]]:
    """Note every message that this rank sends or receives within the block."""
    notes: list[Note] = []

    def noting(what: str, call: Any, other: str) -> Any:
        def noted(tensor: Any = None, *args: Any, **kwargs: Any) -> Any:
            number = len(notes)
            notes.append((what, number, kwargs["group"].group_name, kwargs[other]))
            return _Work(call(tensor, *args, **kwargs), number, notes)

        return noted

    forward = EsoModel.forward

    def capturing(model: EsoModel, rows: Any) -> Any:
        notes.append(("capture", len(notes), "", -1))  # as the first step of a run with graphs may
        return forward(model, rows)

    stand_ins = (
        (torch.distributed, "isend", noting("send", dist.isend, "dst")),
        (torch.distributed, "irecv", noting("receive", dist.irecv, "src")),
        (EsoModel, "forward", capturing),
    )
    with replaced(stand_ins):
        yield notes


def of_a_run(overrides: list[str], evaluates_first: bool) -> list[Note]:
    """Return what this rank did in two training steps and an evaluation."""
    with recorded() as notes:
        session = rank_jobs.make_session(overrides)
        for step in range(2):
            if evaluates_first == (step == 0):
                with whole_weights(session.chunks):
                    evaluate(session.replica, _read, num_rows=8, bytes_per_token=1.0)
            train_step(session, rank_jobs.read_rows)
    return notes


def _read(rows: list[int]) -> Rows:
    return rank_jobs.read_rows(99, rows)


def stuck(ranks: list[list[Note]]) -> str:
    """Return where ranks would wait forever, or an empty string."""
    run = _Run(ranks)
    while run.advance():
        pass
    return run.left()


class _Run:
    """All ranks and how far each has come."""

    def __init__(self, ranks: list[list[Note]]) -> None:
        self._ranks = ranks
        self._at = [0] * len(ranks)
        self._issued: list[list[Note]] = [[] for _ in ranks]
        self._started: list[set[int]] = [set() for _ in ranks]
        self._done: list[set[int]] = [set() for _ in ranks]
        self._queues: dict[tuple[int, str, int], list[int]] = defaultdict(list)
        """Numbers issued by (rank, group, other rank)."""
        self._kinds = [{note[1]: note[0] for note in notes if note[2]} for notes in ranks]

    def advance(self) -> bool:
        """Advance every rank and every exchange as far as possible; return whether any advanced."""
        moved = [self._host(rank) for rank in range(len(self._ranks))]
        moved += [self._device(rank) for rank in range(len(self._ranks))]
        return any(moved)

    def left(self) -> str:
        """Return what each unfinished rank waits for."""
        return "; ".join(
            f"rank {rank} at {at}: {self._ranks[rank][at]}"
            for rank, at in enumerate(self._at)
            if at < len(self._ranks[rank])
        ) or "; ".join(
            f"rank {rank}: {len(done)} of {len(issued)} done"
            for rank, (done, issued) in enumerate(zip(self._done, self._issued, strict=True))
            if len(done) < len(issued)
        )

    def _host(self, rank: int) -> bool:
        if self._at[rank] == len(self._ranks[rank]):
            return False
        what, number, group, other = note = self._ranks[rank][self._at[rank]]
        if what == "wait":
            may = number in self._done[rank]
        elif what == "capture":
            may = len(self._done[rank]) == len(self._issued[rank])
        else:
            may = bool(self._queues[rank, group, other]) or self._is_met(rank, group, other)
            if may:
                self._issued[rank].append(note)
                self._queues[rank, group, other].append(number)
        self._at[rank] += may
        return may

    def _is_met(self, rank: int, group: str, other: int) -> bool:
        """Return whether the other rank has also reached its first exchange with this one in the group."""
        if self._queues[other, group, rank]:
            return True
        at = self._at[other]
        return at < len(self._ranks[other]) and self._ranks[other][at][2:] == (group, rank)

    def _device(self, rank: int) -> bool:
        before = len(self._started[rank]) + len(self._done[rank])
        for _, number, group, other in self._issued[rank]:
            if number in self._started[rank]:
                continue
            queue = self._queues[rank, group, other]
            place = queue.index(number)
            if place and queue[place - 1] not in self._done[rank]:
                break  # and so must all that was issued later
            self._started[rank].add(number)
        for (owner, group, other), queue in list(self._queues.items()):
            if owner == rank:
                for mine, theirs in zip(queue, self._queues[other, group, rank], strict=False):
                    is_pair = {self._kinds[rank][mine], self._kinds[other][theirs]} == {
                        "send",
                        "receive",
                    }
                    if is_pair and mine in self._started[rank] and theirs in self._started[other]:
                        self._done[rank].add(mine)
                        self._done[other].add(theirs)
        return len(self._started[rank]) + len(self._done[rank]) > before
