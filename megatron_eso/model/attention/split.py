"""Attention of D, X and Z rows by ordinary causal kernels and an analytic self term.

Z rows are shifted by one slot (see objective/rows.py), so slot r attends causally to X's keys 0..r:
exactly the true tokens before its copy. Only the copy's own key is missing; it is merged by log-sum-exp:

    s    = scale <q, k_own>          LSE' = logaddexp(LSE, s)
    O'   = exp(LSE - LSE') O + exp(s - LSE') v_own

Copy 0 stands in the last slot and sees nothing but itself: there LSE = -inf. The backward pass gives
the merged (O', LSE') to the kernel's own backward and adds the self term's gradients
(docs/objective.md derives them). On a GPU the self term is compiled to a few kernels that read and write
each number once. Otherwise it would be a dozen passes, which take as long as the attention itself at
L = 4096 (an estimate). Shapes: [R, h, L, d]; P = number of X rows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_eso.model.attention.kernels import Forward, causal_backward, causal_forward
from megatron_eso.model.compiled import is_compiled, run_compiled

_BEYOND_ANY_SCORE = 1e6


def split_attention(
    query: Tensor, key: Tensor, value: Tensor, *, num_pairs: int, scale: float
) -> Tensor:
    """Return the attention output of rows [D; X; Z].

    Args:
        query: [R, h, L, d].
        key: [R, g, L, d] with g dividing h (grouped-query attention).
        value: [R, g, L, d].
        num_pairs: number of X rows and of Z rows.
        scale: factor of the scores.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return _SplitAttention.apply(query, key, value, num_pairs, scale)


class _SplitAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, num_pairs: int, scale: float
    ) -> Tensor:
        first_z = query.shape[0] - num_pairs
        x_rows = slice(first_z - num_pairs, first_z)
        plain = causal_forward(query[:first_z], key[:first_z], value[:first_z], scale)
        parts, saved = [plain.out], [plain.out, plain.lse]
        ctx.states = (plain.state, ())
        if num_pairs:
            seen = causal_forward(query[first_z:], key[x_rows], value[x_rows], scale)
            own = query[first_z:], key[first_z:], value[first_z:]
            out, lse = _of_copies(merge_self, *own, seen.out, seen.lse, scale)
            parts.append(out)
            saved += [out, lse]
            ctx.states = (plain.state, seen.state)
        ctx.save_for_backward(query, key, value, *saved)
        ctx.num_pairs, ctx.scale = num_pairs, scale
        return torch.cat(parts) if num_pairs else plain.out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *saved = ctx.saved_tensors
        grad, scale = grads[0], ctx.scale
        first_z = query.shape[0] - ctx.num_pairs
        x_rows, z_rows = slice(first_z - ctx.num_pairs, first_z), slice(first_z, None)
        plain = Forward(saved[0], saved[1], ctx.states[0])
        d_query, d_key, d_value = causal_backward(
            grad[:first_z], query[:first_z], key[:first_z], value[:first_z], plain, scale
        )
        if not ctx.num_pairs:
            return d_query, d_key, d_value, None, None
        merged = Forward(saved[2], saved[3], ctx.states[1])
        of_x = key[x_rows], value[x_rows]
        copies = _copies_gradients(
            grad[z_rows], query[z_rows], *of_x, key[z_rows], value[z_rows], merged, scale
        )
        d_key[x_rows] += copies[1]
        d_value[x_rows] += copies[2]
        return (
            torch.cat([d_query, copies[0]]),
            torch.cat([d_key, copies[3]]),
            torch.cat([d_value, copies[4]]),
            None,
            None,
        )


def copies_attention(
    query: Tensor, key: Tensor, value: Tensor, own_key: Tensor, own_value: Tensor, *, scale: float
) -> Tensor:
    """Return the attention output of Z rows alone, [P, h, L, d]; D and X rows are computed elsewhere.

    Args:
        query: [P, h, L, d] of the Z rows.
        key: [P, g, L, d] of their X rows.
        value: [P, g, L, d] of their X rows.
        own_key: [P, g, L, d] of the Z rows.
        own_value: [P, g, L, d] of the Z rows.
        scale: factor of the scores.
    """
    groups = query.shape[1] // key.shape[1]
    repeated = (x.repeat_interleave(groups, dim=1) for x in (key, value, own_key, own_value))
    return _CopiesAttention.apply(query, *repeated, scale)


class _CopiesAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        own_key: Tensor,
        own_value: Tensor,
        scale: float,
    ) -> Tensor:
        seen = causal_forward(query, key, value, scale)
        out, lse = _of_copies(merge_self, query, own_key, own_value, seen.out, seen.lse, scale)
        ctx.save_for_backward(query, key, value, own_key, own_value, out, lse)
        ctx.state, ctx.scale = seen.state, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, own_key, own_value, out, lse = ctx.saved_tensors
        merged = Forward(out, lse, ctx.state)
        return (
            *_copies_gradients(grads[0], query, key, value, own_key, own_value, merged, ctx.scale),
            None,
        )


def _copies_gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    merged: Forward,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, X's key and value, own key and own value of Z rows."""
    of_self = grad, query, own_key, own_value, merged.out, merged.lse, scale
    own = _of_copies(self_gradients, *of_self)
    # The last slot saw none of X's keys. The kernel recomputes probabilities as exp(score - lse), so
    # an lse that no score reaches makes them 0. (Zeroing the gradient there is not enough: the
    # probability may overflow, and infinity times 0 is not a number.)
    lse = merged.lse.clone()
    lse[:, :, -1].fill_(_BEYOND_ANY_SCORE)
    seen_by = Forward(merged.out, lse, merged.state)
    seen = causal_backward(grad, query, key, value, seen_by, scale)
    return own[0] + seen[0], seen[1], seen[2], own[1], own[2]


def _of_copies(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return a function's result for tensors [P, h, L, ...], compiled on a GPU for any P and L."""
    if not is_compiled(arguments[0]):
        return function(*arguments)
    return run_compiled(function, *arguments, changing=(0, 2))


def merge_self(
    query: Tensor, key: Tensor, value: Tensor, seen_out: Tensor, seen_lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output and log-sum-exp of Z rows with each copy's own key merged in."""
    score = _own_score(query, key, seen_lse.dtype, scale)
    lse = seen_lse.clone()
    lse[:, :, -1].fill_(-torch.inf)
    merged = torch.logaddexp(lse, score)
    from_seen = (lse - merged).exp().unsqueeze(-1)
    from_own = (score - merged).exp().unsqueeze(-1)
    out = seen_out * from_seen + value * from_own
    return out.to(query.dtype), merged


def _own_score(query: Tensor, key: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    return scale * (query.to(dtype) * key.to(dtype)).sum(dim=-1)


def self_gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    merged_out: Tensor,
    merged_lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the self term's gradients of query, own key and own value.

    With p = exp(s - LSE'): dv = p dO, ds = p (dO . v - dO . O'), dq = ds scale k, dk = ds scale q.
    """
    score = _own_score(query, key, merged_lse.dtype, scale)
    p = (score - merged_lse).exp()
    d_score = (p * (grad * (value - merged_out)).sum(dim=-1) * scale).unsqueeze(-1)
    return (
        (d_score * key).to(query.dtype),
        (d_score * query).to(query.dtype),
        (p.unsqueeze(-1) * grad).to(query.dtype),
    )
