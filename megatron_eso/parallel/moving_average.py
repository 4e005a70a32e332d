"""Exponential moving average of the weights, sharded like the optimizer's master weights."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megatron_eso.parallel.optimizer import gather_weights
from megatron_eso.parallel.parameters import Shard, shards


class MovingAverage:
    """Holds this rank's shards of the averaged weights in float32."""

    def __init__(self, optimizer: Any, decay: float) -> None:
        self.decay, self._optimizer = decay, optimizer
        self.parts: dict[nn.Parameter, Tensor] = {
            parameter: shard.master.detach().clone().float()
            for parameter, shard in shards(optimizer).items()
        }

    def restart(self) -> None:
        """Restart the average at the current master weights."""
        with torch.no_grad():
            for parameter, shard in shards(self._optimizer).items():
                self.parts[parameter].copy_(shard.master)

    def update(self, num_updates: int) -> None:
        """Take in the current weights after ``num_updates`` optimizer steps.

        The decay warms up as min(decay, (1 + n) / (10 + n)), as in the official code.
        """
        decay = min(self.decay, (1 + num_updates) / (10 + num_updates))
        ranges = shards(self._optimizer)
        if not ranges:  # a rank may hold no part of any parameter
            return
        with torch.no_grad():
            # All in one call: one by one, each would be a kernel launch on a GPU.
            torch._foreach_lerp_(  # type: ignore[attr-defined]
                [self.parts[parameter] for parameter in ranges],
                [shard.master for shard in ranges.values()],
                1 - decay,
            )

    @contextlib.contextmanager
    def applied(self, chunks: list[nn.Module]) -> Iterator[None]:
        """Use the averaged weights in the model inside this context; all ranks must enter it.

        Afterwards the weights are written from the masters again, as in an update: no copy is kept. After
        an error, which may be this rank's alone, they stay averaged: no rank may wait for others then.
        """
        ranges = shards(self._optimizer)
        # In fp32 the masters share the weights' memory, and would be overwritten with them.
        kept = {
            parameter: shard.master.clone()
            for parameter, shard in ranges.items()
            if _share_memory(shard.master, parameter)
        }
        _write(chunks, ranges, self.parts)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, own in kept.items():
                    ranges[parameter].master.copy_(own)
        kept.clear()
        masters = {parameter: shard.master for parameter, shard in ranges.items()}
        _write(chunks, ranges, masters)


def _write(
    chunks: list[nn.Module], ranges: dict[nn.Parameter, Shard], parts: dict[nn.Parameter, Tensor]
) -> None:
    """Write the model's weights: every rank its share, and Megatron gathers them, as after an update."""
    with torch.no_grad():
        if ranges:  # a rank may hold no part of any parameter
            torch._foreach_copy_(  # type: ignore[attr-defined]
                [parameter.view(-1)[one.start : one.end] for parameter, one in ranges.items()],
                [parts[parameter] for parameter in ranges],
            )
    gather_weights(chunks)


def _share_memory(some: Tensor, other: Tensor) -> bool:
    return some.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
