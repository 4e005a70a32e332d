"""Two views of the parameters: pieces of layout-free global tensors, and data-parallel shards.

Megatron's sharded state dict says where a rank's tensor stands in the whole model. Its distributed
optimizer says which flat range of a parameter this data-parallel rank updates. Initial weights, the
moving average, checkpoints and comparisons across layouts all use these two views.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_eso.parallel.megatron_patches import importing_megatron

with importing_megatron():
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
    from megatron.core.distributed import DistributedDataParallel


@dataclass(frozen=True)
class Piece:
    """A rank's part of one global tensor."""

    name: str
    """Layout-free name, without the layer's number."""
    layer: int | None
    """Number of the layer over all stages, from 0; None outside the layers."""
    global_shape: tuple[int, ...]
    """Shape of the whole tensor (of one layer)."""
    slices: tuple[slice, ...]
    """Where the piece stands in the whole tensor."""
    data: Tensor
    """The piece; a view of the parameter."""

    @property
    def full_name(self) -> str:
        """Name with the layer's number, unique in the model."""
        return self.name if self.layer is None else f"{self.name}[{self.layer}]"


@dataclass(frozen=True)
class Shard:
    """The flat range [start, end) of a parameter that this data-parallel rank updates."""

    parameter: nn.Parameter
    start: int
    end: int
    master: Tensor
    """float32 master weights of the range, flat."""
    state: dict[str, Tensor]
    """The optimizer's state for the range: flat tensors, and the step count."""


def device_of(chunks: Iterable[nn.Module]) -> torch.device:
    """Return the device of a model's parameters, and thus of exchanges between its ranks."""
    return next(parameter.device for chunk in chunks for parameter in chunk.parameters())


def sharded_parameters(chunks: Iterable[nn.Module]) -> Iterator[Any]:
    """Yield Megatron's sharding description (tensor or factory) of every parameter."""
    for chunk in chunks:
        model = chunk.module if isinstance(chunk, DistributedDataParallel) else chunk
        for entry in model.sharded_state_dict().values():  # type: ignore[operator]
            if isinstance(entry, (ShardedTensor, ShardedTensorFactory)):
                yield entry


def pieces_of(entry: Any, data: Tensor | None = None) -> list[Piece]:
    """Return the pieces of one sharding description, with its own data or ``data`` of the same shape."""
    if isinstance(entry, ShardedTensorFactory):
        built = entry.build_fn(
            entry.key, entry.data if data is None else data, entry.replica_id, None
        )
        tensors = list(built.values()) if isinstance(built, dict) else list(built)
        return [_piece(tensor, tensor.data) for tensor in tensors]
    return [_piece(entry, entry.data if data is None else data)]


def pieces(chunks: Iterable[nn.Module]) -> Iterator[Piece]:
    """Yield the pieces of all parameters of this rank."""
    for entry in sharded_parameters(chunks):
        yield from pieces_of(entry)


def _piece(tensor: ShardedTensor, data: Tensor) -> Piece:
    layer_axes = tensor.prepend_axis_num
    offset = tensor.global_offset[layer_axes:]
    slices = tuple(slice(o, o + n) for o, n in zip(offset, data.shape, strict=True))
    return Piece(
        name=tensor.key,
        layer=tensor.global_offset[0] if layer_axes else None,
        global_shape=tuple(tensor.global_shape[layer_axes:]),
        slices=slices,
        data=data,
    )


def await_gathered(module: nn.Module) -> None:
    """Wait until a module's own parameters are gathered, for code that uses them without calling it.

    With parallel.overlap Megatron waits in hooks before a module's forward.
    """
    for hook in module._forward_pre_hooks.values():
        hook(module, ())


def shards(optimizer: Any) -> dict[nn.Parameter, Shard]:
    """Return, for each parameter that this data-parallel rank updates a part of, its shard.

    Reads Megatron's DistributedOptimizer; tests/test_megatron_patches.py pins the methods used.
    """
    found = {}
    for inner in optimizer.chained_optimizers:
        for parameter in inner.model_param_group_index_map:
            where = inner._get_model_param_range_map(parameter)["param"]
            tensors = dict(inner._get_main_param_and_optimizer_states(parameter))
            master = tensors.pop("param")
            found[parameter] = Shard(parameter, where.start, where.end, master, tensors)
    return found


def gather_full(
    parameter: nn.Parameter, start: int, part: Tensor | None, group: dist.ProcessGroup
) -> Tensor:
    """Return a whole float32 tensor of the parameter's shape from the ranks' flat parts.

    Args:
        parameter: gives shape and device.
        start: first element of this rank's part.
        part: flat values; None if this rank holds none of the parameter.
        group: data-parallel group; all its ranks must call.
    """
    full = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    if part is not None:
        full[start : start + part.numel()] = part
    if group.size() > 1:
        dist.all_reduce(full, group=group)
    return full.view(parameter.shape)


def gather_on(
    parameter: nn.Parameter,
    start: int,
    part: Tensor | None,
    group: dist.ProcessGroup,
    *,
    receiver: int,
) -> Tensor | None:
    """Return what :func:`gather_full` does, but only on one rank of the group; None elsewhere.

    A tensor gathered on a GPU is returned on the CPU, so that many such tensors take no GPU memory.

    Args:
        parameter: gives shape and device.
        start: first element of this rank's part.
        part: flat values; None if this rank holds none of the parameter.
        group: data-parallel group; all its ranks must call.
        receiver: rank within the group that gets the tensor.
    """
    if part is not None and part.numel() == parameter.numel() and group.size() == 1:
        if part.is_cuda:
            return part.view(parameter.shape)
        return own_memory(part).view(parameter.shape)
    full = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    if part is not None:
        full[start : start + part.numel()] = part
    if group.size() > 1:
        dist.reduce(full, dist.get_global_rank(group, receiver), group=group)
    return full.cpu().view(parameter.shape) if group.rank() == receiver else None


def dealt_parameters(chunks: Iterable[nn.Module], num_ranks: int) -> list[tuple[Any, int]]:
    """Return the entries of :func:`sharded_parameters`, each with the rank that :func:`dealt` gives."""
    entries = list(sharded_parameters(chunks))
    return list(zip(entries, dealt((e.data for e in entries), num_ranks), strict=True))


def dealt(parameters: Iterable[nn.Parameter], num_ranks: int) -> list[int]:
    """Return, for each parameter, the rank that handles it whole, so that all have about equal work.

    The largest go first, each to the rank with the least so far (Graham, "Bounds on Multiprocessing Timing
    Anomalies", 1969: at most 4/3 of the best). Ranks with parameters of the same sizes get the same list.
    """
    sizes = [parameter.numel() for parameter in parameters]
    ranks, loads = [0] * len(sizes), [0] * num_ranks
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        ranks[index] = loads.index(min(loads))
        loads[ranks[index]] += sizes[index]
    return ranks


def own_memory(part: Tensor) -> Tensor:
    """Return a CPU tensor that is no view: of a view, writers would copy or save the whole base.

    A tensor on the CPU is not copied: write the result, or fork, before the memory changes.
    """
    return torch.from_numpy(part.detach().cpu().numpy())


def set_moments(
    optimizer: Any, shard: Shard, exp_avg: Tensor, exp_avg_sq: Tensor, step: int
) -> None:
    """Set Adam's moments and step count for a shard; the optimizer takes over the tensors.

    Torch's AdamW counts steps per parameter, each in its own tensor; the FusedAdam of Transformer Engine
    and of Apex counts them per group. Megatron's own loading shares one step tensor among all
    parameters, which AdamW then increments once per parameter.
    """
    for inner in optimizer.chained_optimizers:
        if shard.parameter not in inner.model_param_group_index_map:
            continue
        index, order = inner.model_param_group_index_map[shard.parameter]
        group = inner.optimizer.param_groups[index]
        state = inner.optimizer.state[group["params"][order]]
        state["exp_avg"], state["exp_avg_sq"] = exp_avg, exp_avg_sq
        if isinstance(inner.optimizer, torch.optim.AdamW):
            # The fused update needs the count on the moments' device.
            state["step"] = torch.tensor(float(step), device=exp_avg.device)
        else:
            group["step"] = step
