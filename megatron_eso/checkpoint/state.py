"""The tensors of a checkpoint: every parameter's master weight, moments and average, in float32.

Names are ``weights.NAME``, ``exp_avg.NAME``, ``exp_avg_sq.NAME`` and ``ema.NAME`` with Megatron's
layout-free names and global shapes, so a checkpoint loads at any layout and in any precision. Model
weights in bf16 are not stored: they are the masters, rounded. FP8 layers add their scales (fp8_state.py).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_eso.checkpoint.fp8_state import fp8_objects
from megatron_eso.parallel.megatron_patches import quiet_megatron_import
from megatron_eso.parallel.moving_average import MovingAverage
from megatron_eso.parallel.parameters import (
    Shard,
    gather_on,
    set_moments,
    sharded_parameters,
    shards,
)

with quiet_megatron_import():
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

WEIGHTS, EMA = "weights", "ema"
MOMENTS = ("exp_avg", "exp_avg_sq")


@torch.no_grad()
def collect(
    chunks: list[nn.Module],
    optimizer: Any,
    average: MovingAverage | None,
    group: dist.ProcessGroup,
) -> dict[str, Any]:
    """Return the sharded state that this rank writes; all data-parallel ranks must call.

    The tensors are spread over the data-parallel ranks: each is gathered on one of them alone. Where
    a rank holds a whole tensor on the CPU it is not copied: write it, or fork, before the next step.
    """
    owned = shards(optimizer)
    state: dict[str, Any] = {}
    for index, entry in enumerate(sharded_parameters(chunks)):
        if not _is_first_copy(entry.replica_id):
            continue  # a rank of another data-parallel group writes the same values
        shard = owned.get(entry.data)
        for kind, part in _parts(shard, average, entry.data):
            start = shard.start if shard else 0
            full = gather_on(entry.data, start, part, group, receiver=index % group.size())
            if full is not None:
                own = replace(entry, replica_id=_first_of_group(entry.replica_id))
                add(state, own, kind, full)
    state.update(fp8_objects(chunks, with_data=True))
    return state


def _is_first_copy(replica_id: Any) -> bool:
    """Return whether the data-parallel group of this rank is the one that writes a tensor."""
    return not isinstance(replica_id, tuple) or not any(replica_id[:-1])


def _first_of_group(replica_id: Any) -> Any:
    """Return the id of the copy that is written: the last part is the data-parallel rank."""
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
    """Add one tensor to a sharded state under its kind's name."""
    changes: dict[str, Any] = {"key": f"{kind}.{entry.key}", "data": data}
    if isinstance(entry, ShardedTensor):
        changes["dtype"] = data.dtype
    state[f"{kind}.{entry.key}.{len(state)}"] = replace(entry, **changes)


@dataclass(frozen=True)
class Place:
    """Where the tensors of one parameter are loaded to."""

    parameter: nn.Parameter
    tensors: dict[str, Tensor]
    """By kind, in the parameter's shape, float32."""
    shard: Shard | None
    """What this rank's optimizer updates of the parameter; None: nothing."""
    is_final: bool
    """The tensors are the optimizer's own and the average's own memory: nothing has to be copied."""


def places_of_training(
    chunks: Iterable[nn.Module],
    optimizer: Any,
    average: MovingAverage | None,
    kinds: Iterable[str],
) -> Iterator[tuple[Any, Place]]:
    """Yield each parameter's sharding description and the place that its tensors are loaded to."""
    owned, kinds = shards(optimizer), tuple(kinds)
    for entry in sharded_parameters(chunks):
        parameter = entry.data
        shard = owned.get(parameter)
        is_final = shard is not None and shard.end - shard.start == parameter.numel()
        final: dict[str, Tensor] = {}
        if shard is not None and is_final:
            final[WEIGHTS] = shard.master.detach().view(parameter.shape)
            if average is not None:
                final[EMA] = average.parts[parameter].view(parameter.shape)
        tensors = {k: final[k] if k in final else _empty_like(parameter) for k in kinds}
        yield entry, Place(parameter, tensors, shard, is_final)


def places_of_weights(chunks: Iterable[nn.Module], kind: str) -> Iterator[tuple[Any, Place]]:
    """Yield each parameter's sharding description and a place for one tensor of its shape."""
    for entry in sharded_parameters(chunks):
        yield entry, Place(entry.data, {kind: _empty_like(entry.data)}, None, is_final=False)


def sharded_places(places: Iterable[tuple[Any, Place]]) -> dict[str, ShardedTensor]:
    """Return the sharded state that loads into some places."""
    state: dict[str, ShardedTensor] = {}
    for entry, place in places:
        for kind, data in place.tensors.items():
            for tensor in _sharded(entry, f"{kind}.{entry.key}", data):
                state[f"{tensor.key}.{len(state)}"] = tensor
    return state


def _sharded(entry: Any, key: str, data: Tensor) -> list[ShardedTensor]:
    """Return the sharded tensors of one parameter, as views of ``data``.

    Megatron's factories would join their parts after loading, in new memory.
    """
    if not isinstance(entry, ShardedTensorFactory):
        return [replace(entry, key=key, data=data, dtype=data.dtype)]
    built = entry.build_fn(key, data, entry.replica_id, None)
    return list(built.values()) if isinstance(built, dict) else list(built)


def restore(
    places: Iterable[Place], optimizer: Any, average: MovingAverage | None, *, step: int
) -> None:
    """Take loaded tensors over into the model, the optimizer and the average.

    Args:
        places: where the tensors are.
        optimizer: Megatron's optimizer.
        average: moving average, if the run keeps one.
        step: updates done.
    """
    with torch.no_grad():
        for place in places:
            parameter, shard = place.parameter, place.shard
            _put(parameter, place.tensors[WEIGHTS])
            if shard is None:
                continue
            flat = {k: v.reshape(-1)[shard.start : shard.end] for k, v in place.tensors.items()}
            if not place.is_final:  # a part that keeps the whole alive would cost its memory
                flat = {kind: tensor.clone() for kind, tensor in flat.items()}
            _put(shard.master, flat[WEIGHTS])
            if all(kind in flat for kind in MOMENTS):
                set_moments(optimizer, shard, flat["exp_avg"], flat["exp_avg_sq"], step)
            if average is not None:
                _put(average.parts[parameter], flat.get(EMA, flat[WEIGHTS]))


def _put(target: Tensor, value: Tensor) -> None:
    """Copy values, unless they are there already."""
    if target.data_ptr() != value.data_ptr() or target.dtype != value.dtype:
        target.copy_(value)


def _empty_like(parameter: nn.Parameter) -> Tensor:
    return torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
