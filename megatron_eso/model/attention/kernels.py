"""Fused causal attention with its log-sum-exp, forward and backward, one pair per device.

PyTorch's public attention hides the log-sum-exp that merging needs, so the operators underneath are
called. Shapes: [R, h, L, d] for queries, keys, values and outputs, [R, h, L] for the log-sum-exp.
"""

from typing import NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten


class Forward(NamedTuple):
    """Result of a causal forward call and what its backward needs."""

    out: Tensor
    lse: Tensor
    state: tuple


def causal_forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Forward:
    """Return causal attention (square, top-left aligned) with its log-sum-exp in float32 or better."""
    if query.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, True, scale=scale
        )
        return Forward(out, lse, ())
    if query.dtype in (torch.bfloat16, torch.float16):
        out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = (
            aten._scaled_dot_product_flash_attention(
                query, key, value, 0.0, True, False, scale=scale
            )
        )
        return Forward(out, lse, (cum_q, cum_k, max_q, max_k, seed, offset))
    out, lse, seed, offset = aten._scaled_dot_product_efficient_attention(
        query, key, value, None, True, 0.0, True, scale=scale
    )
    return Forward(out, lse, (seed, offset))


def causal_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forward: Forward,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value.

    ``forward.out`` and ``forward.lse`` may have been merged with further keys since: the kernel
    recomputes its probabilities as exp(score - lse), so it returns its part of the merged softmax.
    """
    out, lse, state = forward
    if query.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, query, key, value, out, lse, 0.0, True, scale=scale
        )
    if query.dtype in (torch.bfloat16, torch.float16):
        cum_q, cum_k, max_q, max_k, seed, offset = state
        return aten._scaled_dot_product_flash_attention_backward(
            grad_out, query, key, value, out, lse, cum_q, cum_k, max_q, max_k, 0.0, True,
            seed, offset, scale=scale,
        )  # fmt: skip
    seed, offset = state
    grads = aten._scaled_dot_product_efficient_attention_backward(
        grad_out, query, key, value, None, out, lse, seed, offset, 0.0, [True, True, True, False],
        True, scale=scale,
    )  # fmt: skip
    return grads[:3]
