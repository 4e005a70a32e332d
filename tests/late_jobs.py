"""Training over gloo in which overlapped collectives happen only when something waits for them.

NCCL's may be that late: a rank that continues without waiting reads weights that are old or incomplete.
Gloo has usually finished by then and would hide this. Here a gather leaves nonsense until it is waited for.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_eso.eval.evaluate import evaluate
from megatron_eso.parallel import optimizer as optimizer_module
from megatron_eso.parallel.exchange import Rows
from megatron_eso.parallel.megatron_patches import importing_megatron
from megatron_eso.parallel.optimizer import whole_weights
from megatron_eso.train import session as session_module
from megatron_eso.train.session import Session
from megatron_eso.train.step import train_step
from tests import cpu_graphs, rank_jobs
from tests.replaced import replaced

with importing_megatron():
    from megatron.core.distributed import param_and_grad_buffer

_NONSENSE = 3.0  # finite: layers warm up for a graph on any weights
_SMALL_BUCKET = 1000  # smaller than a matrix, so each matrix is waited for separately


class Late:
    """Collectives that run only when waited for; takes the place of Megatron's handles."""

    num_waited = 0

    def __init__(self) -> None:
        self._left: list[Callable[[], Any]] = []

    def add(self, collective: Callable[[], Any]) -> None:
        """Add something to do when waited for."""
        self._left.append(collective)

    def wait(self) -> None:
        """Do everything that was added."""
        Late.num_waited += len(self._left)
        for collective in self._left:
            collective()
        self._left.clear()


@contextlib.contextmanager
def late_collectives() -> Iterator[None]:
    """Make Megatron's buffers gather and reduce only when waited for, within the block."""
    current: list[Late] = []

    @contextlib.contextmanager
    def coalesced(group: Any, async_ops: bool = False) -> Iterator[Late]:
        current.append(Late())
        yield current[-1]
        late = current.pop()
        if not async_ops:
            late.wait()

    def gather(
        whole: torch.Tensor, own: torch.Tensor, group: Any = None, async_op: bool = False
    ) -> None:
        kept = own.clone()
        if async_op:
            whole.fill_(_NONSENSE)
            own.copy_(kept)
        current[-1].add(lambda: dist.all_gather_into_tensor(whole, kept, group=group))

    def reduce(own: torch.Tensor, whole: torch.Tensor, op: Any, group: Any, async_op: bool) -> None:
        current[-1].add(lambda: dist.reduce_scatter_tensor(own, whole, op=op, group=group))

    stand_ins = (
        (param_and_grad_buffer, "_coalescing_manager", coalesced),
        (param_and_grad_buffer, "dist_all_gather_func", gather),
        (param_and_grad_buffer, "dist_reduce_scatter_func", reduce),
    )
    with replaced(stand_ins):
        yield


def train(overrides: list[str], is_late: bool) -> dict[str, Any]:
    """Train four steps; evaluate after the second with weights in transit, later with averaged ones."""
    settings = optimizer_module.buffer_settings

    def in_small_buckets(*args: Any, **kwargs: Any) -> Any:
        return replace(settings(*args, **kwargs), bucket_size=_SMALL_BUCKET)

    stand_ins = (
        (optimizer_module, "buffer_settings", in_small_buckets),
        (session_module, "can_capture", lambda device: True),
    )
    Late.num_waited = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # A layer registers its projection before what comes first: seen in buckets smaller than a layer.
        warnings.filterwarnings("ignore", "The next bucket's parameter all-gather", UserWarning)
        stack.enter_context(replaced(stand_ins))
        stack.enter_context(cpu_graphs.instead_of_cuda_graphs())
        session = rank_jobs.make_session(overrides)
        if is_late:
            stack.enter_context(late_collectives())
        losses, scores = [], []
        for step in range(4):
            losses.append(train_step(session, rank_jobs.read_rows).loss)
            if step == 1:
                scores.append(_scores(session))
            elif step == 2 and session.average is not None:
                with whole_weights(session.chunks), session.average.applied(session.chunks):
                    scores.append(_scores(session))
        return {
            "losses": losses,
            "scores": scores,
            "weights": rank_jobs._weights(session),
            "waited": Late.num_waited,
        }


def _scores(session: Session) -> list[float]:
    def read(rows: list[int]) -> Rows:
        return rank_jobs.read_rows(7, rows)

    found = evaluate(session.replica, read, num_rows=6, bytes_per_token=4.0)
    return [score.nats_per_token for score in found]
