"""Rotary positions per row and token: rows are permuted, so every row has its own angles.

Megatron's fused rotary kernel and Transformer Engine's index one table for all rows, which would be
silently wrong here; so the rotation is done in our core attention, with cosines and sines gathered
once per micro-batch. Letters: L tokens, R rows, h heads, d head size.
"""

from typing import Any

import torch
from torch import Tensor


def rotary_table(max_length: int, head_size: int, base: float) -> Tensor:
    """Return [max_length, head_size / 2] float32 angles (arXiv 2104.09864, eq. 15)."""
    exponent = torch.arange(0, head_size, 2, dtype=torch.float64) / head_size
    positions = torch.arange(max_length, dtype=torch.float64)
    return torch.outer(positions, base**-exponent).float()


def gather_angles(table: Tensor, positions_RL: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [L, R, 1, d/2] of each entry's position."""
    angles = table[positions_RL.t()].unsqueeze(2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_LRhd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head by its angles; the inverse rotates the gradient back."""
    return _Rotate.apply(x_LRhd, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, sin, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin, value=sign)
    return out
