"""Where a checkpoint's tensors are loaded to, and how they get into model, optimizer and average.

A rank that shares its weights with no other loads every tensor, if possible into the optimizer's own
memory. Ranks of a data-parallel group share the work as they do for a save: each reads its share of the
parameters from disk and sends them to the others, one parameter at a time. So at the start of a run each
byte is read once per group (at another layout more, see fill.py), and a GPU needs extra room for only one
parameter's tensors.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_eso.checkpoint.state import EMA, MOMENTS, WEIGHTS
from megatron_eso.parallel.megatron_patches import importing_megatron
from megatron_eso.parallel.moving_average import MovingAverage
from megatron_eso.parallel.parameters import Shard, set_moments, sharded_parameters, shards

with importing_megatron():
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory


@dataclass(frozen=True)
class Place:
    """Where the tensors of one parameter are loaded to."""

    parameter: nn.Parameter
    tensors: dict[str, Tensor]
    """By kind, in the parameter's shape, float32."""
    shard: Shard | None
    """The part of the parameter that this rank's optimizer updates; None: no part."""
    is_final: bool
    """The tensors are the optimizer's and the average's own memory, so nothing has to be copied."""


def places_of_training(
    chunks: Iterable[nn.Module],
    optimizer: Any,
    average: MovingAverage | None,
    kinds: Iterable[str],
) -> Iterator[tuple[Any, Place]]:
    """Yield each parameter's sharding description, and the place that its tensors are loaded to."""
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
        tensors = {k: final[k] if k in final else _empty(parameter) for k in kinds}
        yield entry, Place(parameter, tensors, shard, is_final)


def places_of_weights(chunks: Iterable[nn.Module], kind: str) -> Iterator[tuple[Any, Place]]:
    """Yield each parameter's sharding description, and a place for one tensor of its shape."""
    for entry in sharded_parameters(chunks):
        yield entry, Place(entry.data, {kind: _empty(entry.data)}, None, is_final=False)


def places_to_share(
    dealt: list[tuple[Any, int]], kinds: tuple[str, ...], rank: int
) -> Iterator[tuple[Any, Place]]:
    """Yield the parameters that one rank of a data-parallel group reads, with places on the CPU."""
    for entry, reader in dealt:
        if reader == rank:
            tensors = {kind: _empty(entry.data, "cpu") for kind in kinds}
            yield entry, Place(entry.data, tensors, None, is_final=False)


def shared(
    dealt: list[tuple[Any, int]],
    optimizer: Any,
    mine: Iterable[Place],
    kinds: tuple[str, ...],
    group: dist.ProcessGroup,
) -> Iterator[Place]:
    """Yield every parameter with its tensors, sent by the rank of the group that has read them.

    All ranks of the group must iterate to the end. A tensor is valid until the next parameter.
    """
    owned = shards(optimizer)
    read = {place.parameter: place for place in mine}
    for entry, reader in dealt:
        parameter, tensors = entry.data, {}
        for kind in kinds:
            if reader == group.rank():
                tensor = read[parameter].tensors.pop(kind).to(parameter.device)
            else:
                tensor = _empty(parameter)
            dist.broadcast(tensor, dist.get_global_rank(group, reader), group=group)
            tensors[kind] = tensor
        yield Place(parameter, tensors, owned.get(parameter), is_final=False)


def sharded_places(places: Iterable[tuple[Any, Place]]) -> Iterator[ShardedTensor]:
    """Yield the sharded tensors that are loaded into these places."""
    for entry, place in places:
        for kind, data in place.tensors.items():
            yield from _sharded(entry, f"{kind}.{entry.key}", data)


def _sharded(entry: Any, key: str, data: Tensor) -> list[ShardedTensor]:
    """Return the sharded tensors of one parameter, as views of ``data``.

    Megatron's factories would join the parts after loading, in new memory.
    """
    if not isinstance(entry, ShardedTensorFactory):
        return [replace(entry, key=key, data=data, dtype=data.dtype)]
    built = entry.build_fn(key, data, entry.replica_id, None)
    return list(built.values()) if isinstance(built, dict) else list(built)


@torch.no_grad()
def restore(
    places: Iterable[Place], optimizer: Any, average: MovingAverage | None, *, step: int
) -> None:
    """Move loaded tensors into the model, the optimizer and the average.

    Args:
        places: the loaded tensors.
        optimizer: Megatron's optimizer.
        average: moving average, if the run keeps one.
        step: number of updates done.
    """
    for place in places:
        parameter, shard = place.parameter, place.shard
        _put(parameter, place.tensors[WEIGHTS])
        if shard is None:
            continue
        flat = {k: v.reshape(-1)[shard.start : shard.end] for k, v in place.tensors.items()}
        _put(shard.master, flat[WEIGHTS])
        if all(kind in flat for kind in MOMENTS):
            # Clone: a view would keep the whole tensor's memory alive.
            first, second = (flat[k] if place.is_final else flat[k].clone() for k in MOMENTS)
            set_moments(optimizer, shard, first, second, step)
        if average is not None:
            _put(average.parts[parameter], flat.get(EMA, flat[WEIGHTS]))


def _put(target: Tensor, value: Tensor) -> None:
    """Copy values, unless they are already there."""
    if target.data_ptr() != value.data_ptr() or target.dtype != value.dtype:
        target.copy_(value)


def _empty(parameter: nn.Parameter, device: str | None = None) -> Tensor:
    return torch.empty(parameter.shape, dtype=torch.float32, device=device or parameter.device)
