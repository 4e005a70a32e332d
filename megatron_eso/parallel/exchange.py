"""Small exchanges between ranks: data rows within a model replica, and agreement among all ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_eso.errors import CheckpointError, DataError
from megatron_eso.objective.rows import StackRows, part_of_rows, to_device
from megatron_eso.parallel.groups import Layout
from megatron_eso.parallel.megatron_patches import importing_megatron

with importing_megatron():
    from megatron.core import tensor_parallel

Result = TypeVar("Result")


@dataclass(frozen=True)
class Rows:
    """Token rows of this data-parallel rank for one step."""

    tokens: Tensor
    """[n, L + 1] int64, on the CPU."""
    is_valid: Tensor
    """[n, L + 1] bool."""


def read_together(
    read: Callable[[], Rows], layout: Layout, device: torch.device, *, shape: tuple[int, int]
) -> Rows:
    """Return rows that one rank of each model replica reads and the others receive.

    A failure to read on any rank raises on all ranks, so that none waits in a collective forever.

    Args:
        read: reads the rows; called only on the first rank of the replica.
        layout: this rank's place.
        device: device of the collectives.
        shape: (n, L + 1).

    Raises:
        DataError: on every rank, saying which ranks failed and why.
    """
    leader = dist.get_global_rank(layout.replica_group, 0)
    rows = together(lambda: read() if dist.get_rank() == leader else None, device)
    if layout.replica_group.size() == 1:
        assert rows is not None
        return rows
    packed = torch.empty(shape, dtype=torch.int64, device=device)
    if rows is not None:
        packed.copy_(torch.where(rows.is_valid, rows.tokens, -1 - rows.tokens))
    dist.broadcast(packed, src=leader, group=layout.replica_group)
    packed = packed.cpu()
    is_valid = packed >= 0
    return Rows(torch.where(is_valid, packed, -1 - packed), is_valid)


def rows_of_rank(rows: StackRows, layout: Layout, device: torch.device) -> StackRows:
    """Return this context rank's part of a micro-batch, on its device."""
    return to_device(part_of_rows(rows, layout.context_rank, layout.context_size), device)


def together(
    use: Callable[[], Result], device: torch.device, kind: type[Exception] = DataError
) -> Result:
    """Return what ``use`` returns on this rank. All ranks must call this.

    Raises:
        DataError: (or ``kind``) on every rank if ``use`` raises it, or an OSError, on any rank, so that
            none waits for another forever.
    """
    result, failure = None, ""
    try:
        result = use()
    except (kind, OSError) as error:
        failure = str(error) or type(error).__name__
    if any_rank([bool(failure)], device)[0]:
        raise kind(_said_by(gather_messages(failure)))
    return result  # type: ignore[return-value]


def raise_together(failure: str, kind: type[Exception], device: torch.device) -> None:
    """Raise ``kind`` on all ranks if ``failure`` is not empty on any; return otherwise."""
    if any_rank([bool(failure)], device)[0]:
        raise kind("; ".join(message for message in gather_messages(failure) if message))


def from_first_rank(make: Callable[[], Result], device: torch.device) -> Result:
    """Return, on all ranks, what ``make`` returns on rank 0, which alone calls it.

    Raises:
        CheckpointError: on every rank, if ``make`` raises it or an OSError.
    """
    made: list[Result | None] = [None]
    failure = ""
    if dist.get_rank() == 0:
        try:
            made = [make()]
        except (CheckpointError, OSError) as error:
            failure = str(error) or type(error).__name__
    raise_together(failure, CheckpointError, device)
    dist.broadcast_object_list(made, src=0)
    return made[0]  # type: ignore[return-value]


def gather_messages(message: str) -> list[str]:
    """Return every rank's message, in rank order."""
    messages: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    return messages


def _said_by(messages: list[str]) -> str:
    """Return each message once, with the ranks that sent it unless all did."""
    ranks: dict[str, list[str]] = {}
    for rank, message in enumerate(messages):
        if message:
            ranks.setdefault(message, []).append(str(rank))
    return "; ".join(
        message if len(by) == len(messages) else f"rank {', '.join(by)}: {message}"
        for message, by in ranks.items()
    )


def any_rank(flags: list[bool], device: torch.device) -> list[bool]:
    """Return, for each flag, whether it is set on any rank."""
    packed = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(packed, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in packed.tolist()]


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Return each value summed over all ranks, in float64."""
    packed = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(packed)
    return packed.tolist()


def sum_over_context(values: Tensor, layout: Layout) -> Tensor:
    """Return the sum over context ranks, on all of them.

    Its gradient covers this rank's values only. If every rank continues to the same loss, the gradients
    are complete once they are summed over ranks.
    """
    if layout.context_size == 1:
        return values
    return tensor_parallel.reduce_from_tensor_model_parallel_region(
        values, group=layout.context_group
    )


def send_hidden(layout: Layout, hidden: Tensor) -> None:
    """Send a segment's hidden states to the next pipeline stage."""
    dist.send(hidden.contiguous(), group=layout.pipeline_group, group_dst=layout.pipeline_rank + 1)


def receive_hidden(
    layout: Layout, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Receive a segment's hidden states from the previous pipeline stage."""
    hidden = torch.empty(shape, dtype=dtype, device=device)
    dist.recv(hidden, group=layout.pipeline_group, group_src=layout.pipeline_rank - 1)
    return hidden


def last_stage_tensor(
    values: Tensor | None,
    layout: Layout,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Return, on every stage, what the last pipeline stage holds."""
    if values is None:
        values = torch.empty(shape, dtype=dtype, device=device)
    if layout.pipeline_size > 1:
        values = values.contiguous()
        dist.broadcast(values, group=layout.pipeline_group, group_src=layout.pipeline_size - 1)
    return values
