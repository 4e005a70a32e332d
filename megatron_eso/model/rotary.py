"""Rotary positions per row and token: rows are permuted, so every row has its own angles.

Megatron's fused rotary kernel and Transformer Engine's index one table for all rows, which would be
silently wrong here; so the rotation is done in our core attention, with cosines and sines gathered
once per micro-batch, and on a GPU compiled to one kernel. Letters: L tokens, R rows, h heads, d head size.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


def rotary_tables(max_length: int, head_size: int, base: float) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [max_length, head_size / 2] in float64 (arXiv 2104.09864, eq. 15)."""
    exponent = torch.arange(0, head_size, 2, dtype=torch.float64) / head_size
    angles = torch.outer(torch.arange(max_length, dtype=torch.float64), base**-exponent)
    return angles.cos(), angles.sin()


def gather_angles(table: Tensor, positions_RL: Tensor) -> Tensor:
    """Return [L, R, 1, d/2]: a table's rows at each entry's position."""
    return table[positions_RL.t()].unsqueeze(2)


def rotate(x_LRhd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head by its angles; the inverse rotates the gradient back."""
    return _Rotate.apply(x_LRhd, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        # Detached: the compiler would take what requires a gradient for a case of its own.
        return _turn(x.is_cuda)(x.detach(), cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0].is_cuda)(grads[0], cos, sin, -1), None, None


@cache
def _turn(is_cuda: bool) -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:
    """Return the rotation of a device: on a GPU one kernel that reads and writes each number once."""
    return torch.compile(turned_at_once) if is_cuda else _turned_by_halves


def turned_at_once(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """Return x turned by its angles, by minus them for sign -1; for a compiler."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin * sign, second * cos + first * sin * sign], dim=-1)


def _turned_by_halves(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin, value=sign)
    return out
