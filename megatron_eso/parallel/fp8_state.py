"""The scales and histories that FP8 layers carry from step to step, module by module.

Transformer Engine hands them over as one opaque value a module (``get_extra_state``). They are the same
on all tensor ranks, and only delayed scaling has any: that of the linear layers, and that of attention.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_eso.parallel.megatron_patches import quiet_megatron_import

with quiet_megatron_import():
    from megatron.core.distributed import DistributedDataParallel


@dataclass(frozen=True)
class Stateful:
    """A module with FP8 state."""

    name: str
    """Path within its layer."""
    layer: int
    """Number of the layer over all stages, from 0."""
    num_layers: int
    """Layers of the model."""
    module: nn.Module


def stateful_modules(chunks: Iterable[nn.Module]) -> Iterator[Stateful]:
    """Yield this rank's modules whose FP8 state a checkpoint must hold; none without delayed scaling."""
    for chunk in chunks:
        model: Any = chunk.module if isinstance(chunk, DistributedDataParallel) else chunk
        config = model.config
        has_state = config.fp8 and (
            config.fp8_recipe == "delayed" or config.fp8_dot_product_attention
        )
        for layer in model.decoder.layers if has_state else ():
            for name, module in layer.named_modules():
                if type(module).get_extra_state is not nn.Module.get_extra_state:
                    yield Stateful(name, layer.layer_number - 1, config.num_layers, module)


def get_state(module: nn.Module) -> torch.Tensor:
    """Return a module's FP8 state as bytes on the CPU; empty if it has none yet."""
    state: Any = module.get_extra_state()
    if state is None:
        return torch.empty(0, dtype=torch.uint8)
    if not isinstance(state, torch.Tensor):
        raise TypeError(
            f"{type(module).__name__} gives its FP8 state as {type(state).__name__}, not as a tensor of "
            "bytes: this version of Transformer Engine is not known (docs/gpu.md)"
        )
    return state.detach().cpu().clone()


def set_state(module: nn.Module, state: torch.Tensor) -> None:
    """Give a module the state that :func:`get_state` returned."""
    if state.numel():
        module.set_extra_state(state)
