"""Normalization layers for Megatron's specs without Transformer Engine or Apex.

Megatron's own wrapper of torch's norms refuses sequence parallelism. The layers here mark their
parameters with ``sequence_parallel``, so that Megatron sums their gradients over tensor ranks.
"""

from typing import Any

import torch
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """Root-mean-square normalization over the last dimension."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _mark(self, config.sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:
        """Return x times its scale, divided by its root mean square."""
        # On a GPU torch has a fused kernel; for 16-bit tensors it computes in float32.
        if x.device.type == "cpu" and x.dtype is self.weight.dtype and x.element_size() >= 4:
            return _RMSNorm.apply(x, self.weight, self.eps)
        return super().forward(x)


class _RMSNorm(torch.autograd.Function):
    """RMS norm in few passes over memory; torch's own on a CPU takes a dozen, and backward twice that.

    With r = 1 / sqrt(mean(x^2) + eps):  y = r w x,  dx = r w dy - x r^3 / H sum(w x dy),  dw = sum(r x dy).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        r = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        x, weight, r = ctx.saved_tensors
        size = x.shape[-1]
        product = (grad * x).reshape(-1, size)
        towards_x = (product @ weight).view(r.shape).mul_(r.pow(3)).div_(-size)
        d_x = (grad * weight).mul_(r).addcmul_(x, towards_x)
        return d_x, r.reshape(-1) @ product, None


class LayerNorm(nn.LayerNorm):
    """Layer normalization over the last dimension, with scale and shift."""

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
