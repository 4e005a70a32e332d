"""The same masks in PyTorch's FlexAttention, as in the official code; the oracle on a GPU.

On a GPU it is compiled and skips blocks that nobody may look at. On a CPU PyTorch interprets it and has
no backward pass, so there only tests use it. Shapes: [R, h, L, d].
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megatron_eso.objective.rows import Pattern


def flex_rows_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_pairs: int,
    scale: float,
    pattern: Pattern = Pattern.CAUSAL,
    block_size: int = 0,
    is_valid: Tensor | None = None,
) -> Tensor:
    """Return the attention output of rows [D; X; Z] under any pattern."""
    first_z = query.shape[0] - num_pairs
    length, device = query.shape[2], query.device
    if is_valid is None:
        mask = _plain_mask(length, pattern, block_size, device)
    else:
        mask = _valid_mask(is_valid[:first_z], pattern, block_size)
    plain = _attend(query[:first_z], key[:first_z], value[:first_z], mask, scale)
    if not num_pairs:
        return plain
    x_rows = slice(first_z - num_pairs, first_z)
    keys = torch.cat([key[x_rows], key[first_z:]], dim=2)
    values = torch.cat([value[x_rows], value[first_z:]], dim=2)
    if is_valid is None:
        mask = _copies_mask(length, pattern, block_size, device)
    else:
        mask = _valid_copies_mask(is_valid[first_z:], block_size)
    return torch.cat([plain, _attend(query[first_z:], keys, values, mask, scale)])


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float) -> Tensor:
    function = _kernel(query.is_cuda)
    return function(
        query, key, value, block_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


@cache
def _kernel(is_compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if is_compiled else flex_attention


@cache
def _plain_mask(length: int, pattern: Pattern, block_size: int, device: torch.device) -> Any:
    if pattern is Pattern.BIDIRECTIONAL:
        return None
    size = block_size if pattern is Pattern.BLOCK else 1

    def may_look(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query // size >= key // size

    return _block_mask(may_look, None, length, length, device)


def _valid_mask(is_valid: Tensor, pattern: Pattern, block_size: int) -> Any:
    def may_look_both_ways(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return is_valid[row, key]

    def may_look_in_blocks(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = is_valid[row, key] & (query // block_size >= key // block_size)
        return seen | (query == key)

    may_look = may_look_in_blocks if pattern is Pattern.BLOCK else may_look_both_ways
    rows, length = is_valid.shape
    return _block_mask(may_look, rows, length, length, is_valid.device)


@cache
def _copies_mask(length: int, pattern: Pattern, block_size: int, device: torch.device) -> Any:
    def may_look_shifted(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        copy = (query + 1) % length  # slot r holds copy r + 1, the last slot copy 0
        return ((key < length) & (key < copy)) | (key - length == query)

    def may_look_in_blocks(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block = query // block_size
        is_earlier_truth = (key < length) & (key // block_size < block)
        return is_earlier_truth | ((key >= length) & ((key - length) // block_size == block))

    may_look = may_look_in_blocks if pattern is Pattern.BLOCK else may_look_shifted
    return _block_mask(may_look, None, length, 2 * length, device)


def _valid_copies_mask(is_valid: Tensor, block_size: int) -> Any:
    rows, length = is_valid.shape

    def may_look(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own, place = key >= length, key % length
        block, other = query // block_size, place // block_size
        seen = torch.where(own, other == block, other < block) & is_valid[row, place]
        return seen | (own & (place == query))

    return _block_mask(may_look, rows, length, 2 * length, is_valid.device)


def _block_mask(
    may_look: Callable[..., Tensor],
    rows: int | None,
    num_queries: int,
    num_keys: int,
    device: torch.device,
) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(may_look, rows, None, num_queries, num_keys, device=str(device))
