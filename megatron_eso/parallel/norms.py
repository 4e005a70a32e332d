"""Normalisation layers for Megatron's specs without Transformer Engine or Apex.

Megatron's own wrapper of torch's norms refuses sequence parallelism. These mark their parameters
with ``sequence_parallel``, which makes Megatron sum their gradients over tensor ranks.
"""

from typing import Any

from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """Root-mean-square normalisation over the last dimension."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _mark(self, config.sequence_parallel)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation over the last dimension, with scale and shift."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _mark(self, config.sequence_parallel)


def _mark(module: nn.Module, sequence_parallel: bool) -> None:
    for parameter in module.parameters():
        parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]


def select_entries(hidden_LRH: Tensor, entries: Tensor) -> Tensor:
    """Return [N, H]: the hidden states of the flat entries row * L + slot of [L, R, H]."""
    length, num_rows = hidden_LRH.shape[:2]
    row, slot = entries // length, entries % length
    return hidden_LRH.reshape(length * num_rows, -1).index_select(0, slot * num_rows + row)
