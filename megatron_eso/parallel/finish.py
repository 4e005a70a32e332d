"""Shut down the process groups in good order at the end of a command."""

import atexit
from collections.abc import Callable

import torch.distributed as dist

from megatron_eso.parallel.megatron_patches import importing_megatron

with importing_megatron():
    from megatron.core import parallel_state


_first: list[Callable[[], None]] = []


def before_finish(act: Callable[[], None]) -> None:
    """Have ``act`` called before the groups are destroyed, or at exit if they never are."""
    if act not in _first:
        _first.append(act)
        atexit.register(act)


def finish() -> None:
    """Destroy the groups, if there are any."""
    for act in _first:
        act()
    if dist.is_initialized():
        if parallel_state.is_initialized():
            parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
