"""The layout's process groups, built and held by Megatron's parallel_state."""

import math
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_eso.config.schema import ParallelConfig
from megatron_eso.objective.randomness import Stream, uniform
from megatron_eso.parallel.megatron_patches import importing_megatron

with importing_megatron():
    from megatron.core import parallel_state, tensor_parallel


@dataclass(frozen=True)
class Layout:
    """This rank's place in the layout, and its groups."""

    data_rank: int
    data_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    context_rank: int
    context_size: int
    weights_group: dist.ProcessGroup
    """Ranks with the same weights, over which gradients are summed: data x context ranks."""
    context_group: dist.ProcessGroup
    tensor_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup
    replica_group: dist.ProcessGroup
    """Ranks that compute the same data rows: tensor x context x pipeline ranks."""

    @property
    def is_last_stage(self) -> bool:
        """True where losses are computed."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def reports_losses(self) -> bool:
        """True on one of the tensor ranks that all hold the same losses.

        Context ranks hold the losses of different entries, so each of them reports its own.
        """
        return self.is_last_stage and self.tensor_rank == 0

    @property
    def is_first_stage(self) -> bool:
        """True where tokens are embedded."""
        return self.pipeline_rank == 0


def build_groups(parallel: ParallelConfig, *, seed: int, timeout_seconds: float = 600.0) -> Layout:
    """Create the layout's groups and return this rank's place; the process group must be up.

    Args:
        parallel: sizes of the axes.
        seed: seed of Megatron's random states (dropout); tensor ranks get different ones.
        timeout_seconds: limit of the groups' collectives, rounded up to whole minutes.
    """
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    chunks = parallel.virtual_pipeline
    minutes = math.ceil(timeout_seconds / 60)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        context_parallel_size=parallel.context,
        distributed_timeout_minutes=minutes,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    groups: Any = parallel_state  # its annotations include what only extra arguments make it return
    return Layout(
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=parallel_state.get_context_parallel_world_size(),
        weights_group=groups.get_data_parallel_group(with_context_parallel=True),
        context_group=groups.get_context_parallel_group(),
        tensor_group=groups.get_tensor_model_parallel_group(),
        pipeline_group=groups.get_pipeline_model_parallel_group(),
        replica_group=_replica_group(parallel, groups, timedelta(minutes=minutes)),
    )


def _replica_group(parallel: ParallelConfig, groups: Any, timeout: timedelta) -> dist.ProcessGroup:
    """Return the group of this rank's replica; Megatron's own leaves out the context ranks."""
    if parallel.context == 1:
        return groups.get_model_parallel_group()
    data_ranks: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(data_ranks, groups.get_data_parallel_rank())
    mine: Any = None
    for replica in sorted(set(data_ranks)):  # every rank must create every group
        members = [rank for rank, data_rank in enumerate(data_ranks) if data_rank == replica]
        group = dist.new_group(members, timeout=timeout)
        if dist.get_rank() in members:
            mine = group
    return mine


def seed_dropout(seed: int, step: int, layout: Layout) -> None:
    """Restart Megatron's random states, so that dropout depends only on seed, step and the rank's place.

    Megatron itself gives tensor ranks different states where they hold different entries: it adds their
    number to the seed. So the seeds of steps must not be neighbors.
    """
    place = layout.pipeline_rank * layout.weights_group.size() + layout.weights_group.rank()
    drawn = uniform(seed, step, place, Stream.DROPOUT, 1).item()
    tensor_parallel.model_parallel_cuda_manual_seed(int(drawn * 2**53), force_reset_rng=True)
