"""The tensors of a checkpoint: every parameter's master weight, moments and average, in float32.

They are called ``weights.NAME``, ``exp_avg.NAME``, ``exp_avg_sq.NAME`` and ``ema.NAME``, with Megatron's
layout-free names and global shapes, so a checkpoint loads at any layout and in any precision. Model
weights in bf16 are not stored: they are the rounded masters. FP8 layers add their scales (fp8_state.py).
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_eso.checkpoint.fp8_state import fp8_objects
from megatron_eso.parallel.exchange import sum_over_ranks
from megatron_eso.parallel.megatron_patches import importing_megatron
from megatron_eso.parallel.moving_average import MovingAverage
from megatron_eso.parallel.parameters import (
    Shard,
    dealt_parameters,
    gather_on,
    sharded_parameters,
    shards,
)

with importing_megatron():
    from megatron.core.dist_checkpointing import ShardedTensor

WEIGHTS, EMA = "weights", "ema"
MOMENTS = ("exp_avg", "exp_avg_sq")


@torch.no_grad()
def collect(
    chunks: list[nn.Module],
    optimizer: Any,
    average: MovingAverage | None,
    group: dist.ProcessGroup,
) -> dict[str, Any]:
    """Return the sharded state that this rank writes. All data-parallel ranks must call this.

    The tensors are spread over the data-parallel ranks: each is gathered on only one of them. A tensor
    gathered on a GPU goes to the CPU immediately, so that a save needs GPU memory for one tensor. A whole
    tensor that a rank holds on the CPU is not copied: write it, or fork, before the next step.
    """
    owned = shards(optimizer)
    state: dict[str, Any] = {}
    for entry, writer in dealt_parameters(chunks, group.size()):
        if not _is_first_copy(entry.replica_id):
            continue  # a rank of another data-parallel group writes the same values
        shard = owned.get(entry.data)
        for kind, part in _parts(shard, average, entry.data):
            start = shard.start if shard else 0
            full = gather_on(entry.data, start, part, group, receiver=writer)
            if full is not None:
                own = replace(entry, replica_id=first_of_group(entry.replica_id))
                add(state, own, kind, full)
    state.update(fp8_objects(chunks))
    return state


def stored_bytes(
    chunks: list[nn.Module], *, has_average: bool, group: dist.ProcessGroup, device: torch.device
) -> int:
    """Return the bytes of a checkpoint's tensors, without FP8 scales. All ranks must call this.

    Args:
        chunks: wrapped model chunks.
        has_average: the run keeps a moving average.
        group: data-parallel group.
        device: device of the collective.
    """
    elements = 0
    if group.rank() == 0:
        copies = (e for e in sharded_parameters(chunks) if _is_first_copy(e.replica_id))
        elements = sum(entry.data.numel() for entry in copies)
    kinds = 1 + len(MOMENTS) + has_average
    return int(sum_over_ranks([elements * kinds * torch.float32.itemsize], device)[0])


def _is_first_copy(replica_id: Any) -> bool:
    """Return whether this rank's data-parallel group is the one that writes a tensor."""
    return not isinstance(replica_id, tuple) or not any(replica_id[:-1])


def first_of_group(replica_id: Any) -> Any:
    """Return the id of the copy to write or read; the last part of an id is the data-parallel rank."""
    return (*replica_id[:-1], 0) if isinstance(replica_id, tuple) else 0


def _parts(
    shard: Shard | None, average: MovingAverage | None, parameter: nn.Parameter
) -> Iterator[tuple[str, Tensor | None]]:
    """Yield each kind of tensor with this rank's flat part of it."""
    yield WEIGHTS, shard.master if shard else None
    for kind in MOMENTS:
        yield kind, shard.state.get(kind) if shard else None
    if average is not None:
        yield EMA, average.parts.get(parameter)


def add(state: dict[str, Any], entry: Any, kind: str, data: Tensor) -> None:
    """Add one tensor to a sharded state, with its kind in the name."""
    changes: dict[str, Any] = {"key": f"{kind}.{entry.key}", "data": data}
    if isinstance(entry, ShardedTensor):
        changes["dtype"] = data.dtype
    state[f"{kind}.{entry.key}.{len(state)}"] = replace(entry, **changes)
