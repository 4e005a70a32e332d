"""Fused causal attention with its log-sum-exp, forward and backward, one pair per kernel.

PyTorch's public attention hides the log-sum-exp that merging needs, so the operators underneath are
called. They shape it differently: cuDNN's has a further axis, the memory-efficient kernel's is padded
to whole tiles. Shapes here: [R, h, L, d] for queries, keys, values and outputs, [R, h, L] for the
log-sum-exp, in float32 or better.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_eso.config.precision_rules import BROKEN_CUDNN
from megatron_eso.errors import ConfigError

aten = torch.ops.aten
Gradients = tuple[Tensor, Tensor, Tensor]

# L x d up to which a CPU's backward kernel is faster in float32 than in bf16 (docs/performance.md).
_SMALL = 8192
_TILE = 32  # queries whose log-sum-exp the memory-efficient kernel stores together


class Facts(NamedTuple):
    """The facts about a device and its libraries that decide which kernel runs."""

    device_type: str
    capability: tuple[int, int] = (0, 0)
    """Of a CUDA device: (9, 0) is Hopper."""
    cudnn: int = 0
    """Version in cuDNN's own form: 91900 is 9.19.0; 0: there is no cuDNN."""
    is_deterministic: bool = False
    """Results must not depend on timing."""


class Forward(NamedTuple):
    """Result of a causal forward call, with what its backward call needs."""

    out: Tensor
    lse: Tensor
    state: tuple


class Kernel(NamedTuple):
    """A pair of functions; ``forward(q, k, v, scale)``, ``backward(grad, q, k, v, forward, scale)``."""

    name: str
    forward: Callable[[Tensor, Tensor, Tensor, float], Forward]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Forward, float], Gradients]


def choose_kernel(facts: Facts, dtype: torch.dtype, head_size: int) -> Kernel:
    """Return the fastest kernel for this device, dtype and head size; it depends on nothing else.

    Raises:
        ConfigError: if none does, naming the settings that help.
    """
    if facts.device_type == "cpu":
        return CPU
    is_half = dtype in (torch.bfloat16, torch.float16)
    asked = f"head size {head_size} in {str(dtype).removeprefix('torch.')}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ConfigError(
            f"no fused attention kernel on CUDA computes {asked}; use precision.attention=dense"
        )
    step = 8 if is_half else 4
    if head_size % step:
        raise ConfigError(
            f"fused attention kernels on CUDA need a head size that is a multiple of {step}, not {asked} "
            "(model.head_size); or use precision.attention=dense"
        )
    if is_half and _cudnn_fits(facts, head_size):
        return CUDNN
    if is_half and facts.capability >= (8, 0) and head_size <= 256:
        return FLASH
    return EFFICIENT


def _cudnn_fits(facts: Facts, head_size: int) -> bool:
    """Return whether to use cuDNN's: fastest on Hopper and newer, but its sums depend on timing."""
    version = facts.cudnn // 10000, facts.cudnn // 100 % 100, facts.cudnn % 100
    oldest = (9, 3) if facts.capability < (10, 0) else (9, 7)
    is_usable = version >= oldest and version not in BROKEN_CUDNN
    is_new = facts.capability >= (9, 0)
    return is_usable and is_new and head_size <= 128 and not facts.is_deterministic


@cache
def facts_of(device: torch.device) -> Facts:
    """Return what :func:`choose_kernel` must know about a device; constant within a run."""
    if device.type != "cuda":
        return Facts(device.type)
    return Facts(
        device.type,
        torch.cuda.get_device_capability(device),
        _cudnn_version(),
        torch.are_deterministic_algorithms_enabled(),
    )


def _cudnn_version() -> int:
    try:
        return torch.backends.cudnn.version() or 0
    except RuntimeError as error:
        raise ConfigError(
            "PyTorch runs with a cuDNN that it was not built with (CUDNN_HOME and LD_LIBRARY_PATH say "
            f"where others lie; unset them, or name PyTorch's own): {str(error).splitlines()[0]}"
        ) from None


def causal_forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Forward:
    """Return causal attention (square, top-left aligned) with its log-sum-exp."""
    return _kernel_for(query).forward(query, key, value, scale)


def causal_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forward: Forward,
    scale: float,
) -> Gradients:
    """Return the gradients of query, key and value.

    ``forward.out`` and ``forward.lse`` may since have been merged with further keys. The kernels
    recompute probabilities as exp(score - lse), so they return gradients of their part of the merged
    softmax.
    """
    return _kernel_for(query).backward(grad_out, query, key, value, forward, scale)


def masked_forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return attention under a mask with its log-sum-exp.

    Args:
        query: [R, h, n, d].
        key: [R, h, T, d].
        value: [R, h, T, d].
        mask: [R, h, n, T], added to the scores and of their dtype; every query must see a key.
        scale: factor of the scores.
    """
    if query.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=mask, scale=scale
        )
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, True, 0.0, False, scale=scale
    )
    return out, lse[:, :, : query.shape[2]]


@contextmanager
def for_growing_keys() -> Iterator[None]:
    """Keep PyTorch's attention from choosing cuDNN's kernel inside a ``with`` block.

    On Hopper PyTorch prefers that kernel, which plans anew for each number of keys: on an H200 every
    step of a sampler took 150 ms, while a pass over all 2048 tokens took 17 ms (docs/LOG.md).
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def _kernel_for(query: Tensor) -> Kernel:
    return choose_kernel(facts_of(query.device), query.dtype, query.shape[3])


def _cpu_forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Forward:
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, True, scale=scale
    )
    return Forward(out, lse, ())


def _cpu_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, forward: Forward, scale: float
) -> Gradients:
    given = grad_out, query, key, value, forward.out
    if query.dtype is torch.bfloat16 and query.shape[2] * query.shape[3] <= _SMALL:
        given = tuple(x.float() for x in given)
    gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *given, forward.lse, 0.0, True, scale=scale
    )
    return tuple(x.to(query.dtype) for x in gradients)


def _cudnn_forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Forward:
    out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = (
        aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, True, False, scale=scale
        )
    )
    return Forward(out, lse.view(query.shape[:3]), (seed, offset, cum_q, cum_k, max_q, max_k))


def _cudnn_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, forward: Forward, scale: float
) -> Gradients:
    seed, offset, cum_q, cum_k, max_q, max_k = forward.state
    lse = forward.lse.contiguous().unsqueeze(3)
    return aten._scaled_dot_product_cudnn_attention_backward(
        grad_out, query, key, value, forward.out, lse, seed, offset, None, cum_q, cum_k,
        max_q, max_k, 0.0, True, scale=scale,
    )  # fmt: skip


def _flash_forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Forward:
    out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = (
        aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, False, scale=scale)
    )
    return Forward(out, lse, (cum_q, cum_k, max_q, max_k, seed, offset))


def _flash_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, forward: Forward, scale: float
) -> Gradients:
    cum_q, cum_k, max_q, max_k, seed, offset = forward.state
    return aten._scaled_dot_product_flash_attention_backward(
        grad_out, query, key, value, forward.out, forward.lse, cum_q, cum_k, max_q, max_k,
        0.0, True, seed, offset, scale=scale,
    )  # fmt: skip


def _efficient_forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Forward:
    out, lse, seed, offset = aten._scaled_dot_product_efficient_attention(
        query, key, value, None, True, 0.0, True, scale=scale
    )
    return Forward(out, lse[:, :, : query.shape[2]], (seed, offset))


def _efficient_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, forward: Forward, scale: float
) -> Gradients:
    seed, offset = forward.state
    # The kernel requires rows of whole tiles; nobody reads what fills them up.
    lse = torch.nn.functional.pad(forward.lse, (0, -query.shape[2] % _TILE))
    grads = aten._scaled_dot_product_efficient_attention_backward(
        grad_out, query, key, value, None, forward.out, lse, seed, offset, 0.0,
        [True, True, True, False], True, scale=scale,
    )  # fmt: skip
    return grads[:3]


CPU = Kernel("cpu flash", _cpu_forward, _cpu_backward)
CUDNN = Kernel("cudnn", _cudnn_forward, _cudnn_backward)
FLASH = Kernel("flash", _flash_forward, _flash_backward)
EFFICIENT = Kernel("memory-efficient", _efficient_forward, _efficient_backward)
