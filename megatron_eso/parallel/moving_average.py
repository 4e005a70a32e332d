"""Exponential moving average of the weights, sharded like the optimizer's master weights."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_eso.parallel.parameters import gather_full, shards


class MovingAverage:
    """Holds this rank's shards of the averaged weights in float32."""

    def __init__(self, optimizer: Any, decay: float, group: dist.ProcessGroup) -> None:
        self.decay = decay
        self._optimizer, self._group = optimizer, group
        self.parts: dict[nn.Parameter, Tensor] = {
            parameter: shard.master.detach().clone().float()
            for parameter, shard in shards(optimizer).items()
        }

    def restart(self) -> None:
        """Begin again at the current master weights."""
        with torch.no_grad():
            for parameter, shard in shards(self._optimizer).items():
                self.parts[parameter].copy_(shard.master)

    def update(self, num_updates: int) -> None:
        """Take in the current weights after ``num_updates`` optimizer steps.

        The decay warms up as min(decay, (1 + n) / (10 + n)), as in the official code.
        """
        decay = min(self.decay, (1 + num_updates) / (10 + num_updates))
        with torch.no_grad():
            for parameter, shard in shards(self._optimizer).items():
                self.parts[parameter].lerp_(shard.master.float(), 1 - decay)

    @contextlib.contextmanager
    def applied(self, chunks: list[nn.Module]) -> Iterator[None]:
        """Within the context the model's weights are the averaged ones; all ranks must enter."""
        ranges = shards(self._optimizer)
        kept = {}
        with torch.no_grad():
            for parameter in (p for chunk in chunks for p in chunk.parameters()):
                kept[parameter] = parameter.detach().clone()
                start = ranges[parameter].start if parameter in ranges else 0
                full = gather_full(parameter, start, self.parts.get(parameter), self._group)
                parameter.copy_(full)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in kept.items():
                    parameter.copy_(value)
