"""Context parallelism: around the attention, context ranks swap tokens for heads (arXiv 2309.14509).

Outside the attention a rank holds every C-th token of each row, with all heads of its tensor rank; inside
it holds whole rows with a C-th of the heads. So kernels, self terms and masks need not know of context
parallelism. Letters: C = context ranks, L = tokens in a row, n = L / C, R = rows, h and g = query and
key/value heads of a tensor rank, d = head size.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def heads_of_whole_rows(
    query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries [L, R, h/C, d], and keys and values [L, R, g/C or 1, d], of whole rows.

    Where there are fewer key/value heads than context ranks, ranks get copies of them.

    Args:
        query: [n, R, h, d] of this rank's tokens.
        key: [n, R, g, d].
        value: [n, R, g, d].
        group: context ranks; their number divides h, and divides g or is a multiple of it.
    """
    size, groups = group.size(), key.shape[2]
    if groups < size:
        key, value = (x.repeat_interleave(size // groups, dim=2) for x in (key, value))
    counts = [x.shape[2] // size for x in (query, key, value)]
    # One exchange for all three: the heads of rank 0, then those of rank 1, ...
    by_rank = [x.unflatten(2, (size, -1)) for x in (query, key, value)]
    packed = torch.cat(by_rank, dim=3).permute(2, 0, 1, 3, 4)
    received = _Exchange.apply(packed, group)
    # Token i of a row is on rank i % C, in place i // C.
    whole = received.transpose(0, 1).flatten(0, 1)
    found = whole.split(counts, dim=2)
    return found[0], found[1], found[2]


def tokens_of_all_heads(attended: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return [n, R, h d] of this rank's tokens from [L, R, (h/C) d] of whole rows."""
    size = group.size()
    by_rank = attended.unflatten(0, (-1, size)).transpose(0, 1)
    received = _Exchange.apply(by_rank, group)  # [C, n, R, (h/C) d], the heads of each rank
    return received.permute(1, 2, 0, 3).flatten(2)


class _Exchange(torch.autograd.Function):
    """All-to-all of equal parts along the first axis; its backward pass is the same exchange."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _swap(parts, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _swap(grads[0], ctx.group), None


def _swap(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received
