"""Attention of a sampler's segment, which has few queries, to all kept keys.

On a GPU a kernel that takes a mask gives each head to one multiprocessor, which reads keys at a hundredth
of the memory's speed. So where there are many keys, they are cut into chunks that run as further heads;
the chunks' outputs are averaged, weighted by their sums of exponentials (the split of arXiv 2311.01282,
section 3). Letters: R rows, h heads, g key/value heads, n queries, T keys, d head size, c chunks.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_eso.model.attention.kernels import for_growing_keys, masked_forward

_CHUNK = 256  # keys, at least
_MULTIPROCESSORS = 132  # of a Hopper GPU; more chunks than that gain nothing
_MOST_QUERIES = 64  # of a head; more are enough work without chunks


def lowest_score(dtype: torch.dtype) -> float:
    """Return the number that, added to a score, makes its weight 0.

    It is finite, so that a chunk that nobody sees still gives numbers.
    """
    return -6e4 if dtype is torch.float16 else -1e30


def segment_mask(
    own: Tensor, num_keys: int, dtype: torch.dtype, *, is_causal: bool, is_valid: Tensor | None
) -> Tensor:
    """Return the mask added to the scores of a segment: [n, T] or, with padding, [R, 1, n, T].

    A query sees all keys before the segment. Inside the segment it sees the keys up to its own if the
    pattern is causal, else all. Of keys that are not valid it sees only its own. The mask is 0 where a
    query sees a key, elsewhere :func:`lowest_score`.

    Args:
        own: [n] places of the segment's entries among the keys, ascending, on the scores' device.
        num_keys: T; nobody sees keys beyond the segment.
        dtype: of the scores.
        is_causal: whether the segment is causal inside.
        is_valid: [R, T], False for keys of padding; None: no padding.
    """
    place = torch.arange(num_keys, device=own.device)
    seen = place <= (own if is_causal else own[-1:].expand_as(own))[:, None]
    if is_valid is not None:
        seen = (seen & is_valid[:, None, None, :]) | (place == own[:, None])
    return torch.zeros(seen.shape, dtype=dtype, device=own.device).masked_fill_(
        ~seen, lowest_score(dtype)
    )


def attend_to_store(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Return a segment's attention, [R, h, n, d].

    Heads that share a key are stacked as queries of one head. So kernels read keys once; and kernels
    that take a mask (on a GPU) do not take grouped heads.

    Args:
        query: [R, h, n, d].
        key: [R, g, T, d].
        value: [R, g, T, d].
        mask: [n, T] or [R, 1, n, T], added to the scores; None: every query sees every key.
        scale: factor of the scores.
    """
    num_sharing, new = query.shape[1] // key.shape[1], query.shape[2]
    if num_sharing > 1:
        query = query.unflatten(1, (-1, num_sharing)).flatten(2, 3)
        mask = None if mask is None else mask.repeat(*[1] * (mask.dim() - 2), num_sharing, 1)
    chunk = chunk_of(query, key)
    if mask is not None and chunk < key.shape[2]:
        out = _in_chunks(query, key, value, mask, scale, chunk)
    else:
        with for_growing_keys():
            out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return out.unflatten(2, (num_sharing, new)).flatten(1, 2) if num_sharing > 1 else out


def chunk_of(query: Tensor, key: Tensor) -> int:
    """Return how many keys a chunk has: all of them, unless a GPU reads smaller chunks faster."""
    num_keys, head_size = key.shape[2:]
    is_few = query.is_cuda and query.shape[2] <= _MOST_QUERIES
    has_kernel = query.dtype is not torch.float64 and head_size % 8 == 0
    if not (is_few and has_kernel) or num_keys % _CHUNK:
        return num_keys
    chunk, heads = _CHUNK, key.shape[0] * key.shape[1]
    while heads * num_keys // (2 * chunk) >= _MULTIPROCESSORS and num_keys % (2 * chunk) == 0:
        chunk *= 2
    return chunk


def _in_chunks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, chunk: int
) -> Tensor:
    """Return [R, g, n, d]; shapes as in :func:`attend_to_store`, but g heads for the queries too."""
    num_rows, groups, num_keys, _ = key.shape
    cut = num_keys // chunk, chunk
    keys, values = (x.flatten(0, 1).unflatten(1, cut) for x in (key, value))  # [R g, c, chunk, d]
    queries = query.flatten(0, 1)[:, None].expand(-1, cut[0], -1, -1)
    if mask.dim() == 4:
        mask = mask.expand(num_rows, groups, -1, -1).flatten(0, 1)
    masks = mask.unflatten(-1, cut).transpose(-3, -2)  # [(R g,) c, n, chunk]
    out, lse = masked_forward(queries, keys, values, masks.expand(*queries.shape[:3], -1), scale)
    share = torch.softmax(lse, dim=1)[..., None]
    return (out * share).sum(dim=1).to(query.dtype).unflatten(0, (num_rows, groups))
