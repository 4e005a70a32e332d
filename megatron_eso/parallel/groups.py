"""Process groups of the layout, built and held by Megatron's parallel_state."""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_eso.config.schema import ParallelConfig
from megatron_eso.parallel.megatron_patches import quiet_megatron_import

with quiet_megatron_import():
    from megatron.core import parallel_state, tensor_parallel


@dataclass(frozen=True)
class Layout:
    """This rank's place in the layout and the groups it talks in."""

    data_rank: int
    data_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    data_group: dist.ProcessGroup
    tensor_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup
    model_group: dist.ProcessGroup

    @property
    def is_last_stage(self) -> bool:
        """True where losses are computed."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def reports_losses(self) -> bool:
        """True on one rank of each replica: of the tensor ranks that all hold its losses, the first."""
        return self.is_last_stage and self.tensor_rank == 0

    @property
    def is_first_stage(self) -> bool:
        """True where tokens are embedded."""
        return self.pipeline_rank == 0


def build_groups(parallel: ParallelConfig, *, seed: int) -> Layout:
    """Create the groups for a layout; the process group must be up.

    Args:
        parallel: sizes of the axes.
        seed: seed of Megatron's random states (dropout); tensor ranks get different ones.
    """
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    chunks = parallel.virtual_pipeline
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        context_parallel_size=parallel.context,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    groups: Any = (
        parallel_state  # its annotations admit what is not returned without extra arguments
    )
    return Layout(
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        data_group=groups.get_data_parallel_group(),
        tensor_group=groups.get_tensor_model_parallel_group(),
        pipeline_group=groups.get_pipeline_model_parallel_group(),
        model_group=groups.get_model_parallel_group(),
    )


def seed_dropout(seed: int) -> None:
    """Restart Megatron's random states, so that dropout is a function of the seed given."""
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
