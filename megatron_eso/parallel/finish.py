"""Leave the process groups in good order at the end of a command."""

import torch.distributed as dist

from megatron_eso.parallel.megatron_patches import quiet_megatron_import

with quiet_megatron_import():
    from megatron.core import parallel_state


def finish() -> None:
    """Destroy the groups, if there are any."""
    if dist.is_initialized():
        if parallel_state.is_initialized():
            parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
