"""Rotary positions per row and token: rows are permuted, so every row has its own angles.

Megatron's fused rotary kernel and Transformer Engine's index one table for all rows, which would be
silently wrong here. So our core attention does the rotation, with cosines and sines gathered once per
micro-batch. On a GPU it is compiled to one kernel. Letters: L tokens, R rows, h heads, d head size.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_eso.model.compiled import is_compiled, run_compiled


def rotary_tables(max_length: int, head_size: int, base: float) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [max_length, head_size / 2] in float64 (arXiv 2104.09864, eq. 15)."""
    exponent = torch.arange(0, head_size, 2, dtype=torch.float64) / head_size
    angles = torch.outer(torch.arange(max_length, dtype=torch.float64), base**-exponent)
    return angles.cos(), angles.sin()


def gather_angles(table: Tensor, positions_RL: Tensor) -> Tensor:
    """Return [L, R, 1, d/2]: a table's rows at each entry's position."""
    return table[positions_RL.t()].unsqueeze(2)


def rotate(x_LRhd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the two halves of each head rotated by its angles; the backward pass rotates back."""
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
    if not is_compiled(x):
        return _turned_by_halves(x, cos, sin, sign)
    flat = (y.flatten(0, 1) for y in (x, cos, sin))  # so that one size changes, not two
    return run_compiled(turned if sign > 0 else turned_back, *flat, changing=(0,)).view(x.shape)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x rotated by its angles; written for a compiler."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def turned_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x rotated by minus its angles; written for a compiler."""
    return turned(x, cos, -sin)


def _turned_by_halves(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin, value=sign)
    return out
