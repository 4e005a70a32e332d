"""Attention with an explicit mask: slow, obvious, and right; the oracle of the other kernels.

It is also the kernel of the baselines' patterns: block diffusion needs a mask anyway, bidirectional
rows need one only for padding. Shapes: [R, h, L, d]; masks are True where a query may look.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_eso.objective.rows import Pattern


def dense_attention(
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
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    first_z = query.shape[0] - num_pairs
    visible = (None, None) if is_valid is None else (is_valid[:first_z], is_valid[first_z:])
    mask = plain_mask(query.shape[2], pattern, block_size, visible[0], query.device)
    plain = scaled_dot_product_attention(
        query[:first_z], key[:first_z], value[:first_z], attn_mask=mask, scale=scale
    )
    if not num_pairs:
        return plain
    x_rows = slice(first_z - num_pairs, first_z)
    keys = torch.cat([key[x_rows], key[first_z:]], dim=2)
    values = torch.cat([value[x_rows], value[first_z:]], dim=2)
    mask = copies_mask(query.shape[2], pattern, block_size, visible[1], query.device)
    copies = scaled_dot_product_attention(
        query[first_z:], keys, values, attn_mask=mask, scale=scale
    )
    return torch.cat([plain, copies])


def plain_mask(
    length: int,
    pattern: Pattern,
    block_size: int,
    is_valid: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """Return who sees whom in D and X rows: [L, L], or with padding [R, 1, 1 or L, L]; None: all see all.

    In blocks an entry sees itself even if it is padding: everything before it may be padding too.
    """
    if pattern is Pattern.BIDIRECTIONAL:
        return None if is_valid is None else is_valid[:, None, None, :]
    place = torch.arange(length, device=device)
    if pattern is Pattern.BLOCK:
        place = place // block_size
    seen = place[:, None] >= place[None, :]
    if is_valid is None:
        return seen
    own = torch.eye(length, dtype=torch.bool, device=device)
    return (seen & is_valid[:, None, None, :]) | own


def copies_mask(
    length: int,
    pattern: Pattern,
    block_size: int,
    is_valid: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Return what a Z row sees of [its X row; itself]: [L, 2L], or in blocks with padding [R, 1, L, 2L]."""
    slot = torch.arange(length, device=device)
    if pattern is Pattern.BLOCK:
        block = slot // block_size
        seen = torch.cat([block[:, None] > block[None, :], block[:, None] == block[None, :]], dim=1)
        if is_valid is None:
            return seen
        own = torch.eye(length, 2 * length, dtype=torch.bool, device=device).roll(length, dims=1)
        return (seen & is_valid.repeat(1, 2)[:, None, None, :]) | own
    copy = (slot + 1) % length  # slot r holds copy r + 1, the last slot copy 0
    return torch.cat([copy[:, None] > slot[None, :], slot[:, None] == slot[None, :]], dim=1)
