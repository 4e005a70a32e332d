"""The head and the log-probability of each target, with one chunk of logits in memory at a time.

The head is the model's widest product, and passes over its logits cost a third of the product's time. So
a chunk's logits are computed, exponentiated in place in pieces that fit a cache, and used up. Where the
caller knows the loss's gradient (up to a common factor), the forward pass sums the head's gradients;
otherwise the backward pass computes each chunk's logits again.

With e = exp(logit - highest), S = sum of e, and g = dloss / dlog p(target):

    log p = logit_target - highest - log S,   dloss/dlogit = (-g / S) (e - S onehot_target)

so the factor -g / S is applied to the [n, H] side of both products, without another pass over [n, V].
Letters: N = entries with loss, n = entries of a chunk, H = hidden size, V = padded vocabulary, T = tensor
ranks; a rank holds V/T columns.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Logits of a chunk. A CPU gains nothing beyond the size at which products reach full speed.
_CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}
# Logits that are exponentiated together on a CPU: 2 MiB of float32, which a core's cache holds.
_PIECE_ELEMENTS = 2**19
# Gradients that differ from proportional by less than this (relative, each) differ only by rounding.
_SAME = 1e-4


@dataclass(frozen=True)
class Head:
    """The output layer on this tensor rank."""

    weight: Tensor
    """[V/T, H]."""
    bias: Tensor | None
    """[V/T]."""
    num_real_tokens: int
    """Number of token ids that count: the vocabulary without the mask token, whose id is the last."""
    group: dist.ProcessGroup
    """Tensor-parallel group."""
    sums_inputs: bool = True
    """Sum the gradient of the hidden states over the group. False where the gather before does so."""


def target_log_probs(
    hidden: Tensor, targets: Tensor, head: Head, *, loss_gradient: Tensor | None = None
) -> Tensor:
    """Return log p(target) of each entry, normalized over the real tokens.

    The mask token and the padded columns are left out of the normalization: they can never be a
    token of the data, and including them would shift every likelihood.

    Args:
        hidden: [N, H], the same on every tensor rank.
        targets: [N] token ids, below ``num_real_tokens``.
        head: the output layer.
        loss_gradient: [N] the loss's gradient with respect to the result, up to a common factor, if it is
            known in advance: then the backward pass need not compute the logits again. If the gradient
            turns out different, a CPU computes them again. On a GPU, checking would mean waiting for all
            issued work, so there the gradients become not-a-number, which the step guard sees.

    Returns:
        [N] float32 (float64 for float64 inputs), the same on every tensor rank; differentiable with
        respect to ``hidden``, ``head.weight`` and ``head.bias``.
    """
    known = loss_gradient if torch.is_grad_enabled() else None
    return _TargetLogProbs.apply(hidden, head.weight, head.bias, targets, known, head)


class _TargetLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        known: Tensor | None,
        head: Head,
    ) -> Tensor:
        ctx.head, ctx.gradients = head, None
        if known is not None:
            ctx.gradients = _Gradients(hidden, head)
        ctx.save_for_backward(hidden, targets, known)
        found = []
        for part, space in _chunks(hidden, head):
            chunk = _Chunk(hidden[part], targets[part], head, space)
            found.append(chunk.log_probs)
            if ctx.gradients is not None and known is not None:
                ctx.gradients.add(part, chunk, known[part])
        return torch.cat(found) if found else _no_entries(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets, known = ctx.saved_tensors
        grad, gradients = grads[0], ctx.gradients
        factor = None if gradients is None else _common_factor(grad, known)
        if gradients is None or factor is None:
            gradients = _Gradients(hidden, ctx.head)
            for part, space in _chunks(hidden, ctx.head):
                chunk = _Chunk(hidden[part], targets[part], ctx.head, space)
                gradients.add(part, chunk, grad[part])
        ctx.gradients = None
        return (*gradients.total(factor), None, None, None)


class _Chunk:
    """A chunk's exponentiated logits. Computing the gradients overwrites them."""

    def __init__(self, hidden: Tensor, targets: Tensor, head: Head, space: Tensor) -> None:
        torch.mm(hidden, head.weight.t(), out=space)
        if head.bias is not None:
            space += head.bias
        self.hidden = hidden
        e = space if space.dtype in (torch.float32, torch.float64) else space.float()
        first = head.group.rank() * e.shape[1]
        e[:, max(head.num_real_tokens - first, 0) :] = -torch.inf
        highest = e.amax(dim=1)
        _reduce(highest, dist.ReduceOp.MAX, head.group)
        local = targets - first
        self._is_here = (local >= 0) & (local < e.shape[1])
        self._local = local.clamp(0, e.shape[1] - 1)[:, None]
        target_logit = (e.gather(1, self._local)[:, 0] - highest).masked_fill(~self._is_here, 0.0)
        both = torch.stack([target_logit, _exponentiate(e, highest)])
        _reduce(both, dist.ReduceOp.SUM, head.group)
        self.e, self.total = e, both[1]
        self.log_probs = both[0] - self.total.log()

    def subtract_targets(self) -> Tensor:
        """Turn e into e - S onehot_target, in place, and return it."""
        return self.e.scatter_add_(1, self._local, (-self.total * self._is_here)[:, None])


class _Gradients:
    """Gradients of hidden states, weight and bias, summed chunk by chunk."""

    def __init__(self, hidden: Tensor, head: Head) -> None:
        weight = head.weight
        self._head = head
        # Sums over chunks are kept in float32, or float64 for float64 weights.
        wide = torch.float64 if weight.dtype is torch.float64 else torch.float32
        self._hidden = torch.empty_like(hidden)
        self._weight = torch.zeros(weight.shape, dtype=wide, device=weight.device)
        self._bias = None if head.bias is None else self._weight.new_zeros(weight.shape[0])

    def add(self, part: slice, chunk: _Chunk, gradient: Tensor) -> None:
        """Add a chunk's share for dloss / dlog p = ``gradient`` [n]."""
        factor = (-gradient / chunk.total)[:, None]
        e = chunk.subtract_targets().to(chunk.hidden.dtype)
        self._hidden[part] = (e @ self._head.weight) * factor
        scaled = (chunk.hidden * factor).to(e.dtype)
        if self._weight.dtype is e.dtype:
            self._weight.addmm_(e.t(), scaled)
        else:
            self._weight += e.t() @ scaled
        if self._bias is not None:
            self._bias += e.t().to(self._bias.dtype) @ factor[:, 0].to(self._bias.dtype)

    def total(self, factor: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the sums times a factor (None: 1); that of the hidden states is over all tensor ranks."""
        found = [x for x in (self._hidden, self._weight, self._bias) if x is not None]
        if factor is not None:
            found = [x.mul_(factor.to(x.dtype)) for x in found]
        if self._head.sums_inputs:
            _reduce(found[0], dist.ReduceOp.SUM, self._head.group)
        dtype = self._head.weight.dtype
        return found[0], found[1].to(dtype), found[2].to(dtype) if len(found) > 2 else None


def _chunks(hidden: Tensor, head: Head) -> Iterator[tuple[slice, Tensor]]:
    """Yield each chunk's entries, evenly dealt and as many as fit, with the space for their logits.

    All chunks share one space: on a CPU, the pages of a new one would cost a tenth of the time.
    """
    number, width = len(hidden), head.weight.shape[0]
    most = max(1, _CHUNK_ELEMENTS.get(hidden.device.type, 2**27) // width)
    num_chunks = -(-number // most)
    bounds = [number * i // num_chunks for i in range(num_chunks + 1)] if number else [0]
    space = hidden.new_empty(min(most, number), width)
    for first, end in itertools.pairwise(bounds):
        yield slice(first, end), space[: end - first]


def _exponentiate(e: Tensor, highest: Tensor) -> Tensor:
    """Turn logits [n, V/T] into exp(logit - highest), in place; return their sums [n]."""
    rows = len(e) if e.device.type != "cpu" else max(1, _PIECE_ELEMENTS // e.shape[1])
    sums = [
        piece.sub_(top[:, None]).exp_().sum(dim=1)
        for piece, top in zip(e.split(rows), highest.split(rows), strict=True)
    ]
    return torch.cat(sums)


def _common_factor(grad: Tensor, known: Tensor) -> Tensor | None:
    """Return c such that grad = c * known for all entries; if there is none, None (nan on a GPU)."""
    factor = (grad * known).sum() / (known * known).sum().clamp(min=torch.finfo(grad.dtype).tiny)
    expected = factor * known
    is_same = ((grad - expected).abs() <= _SAME * expected.abs()).all()
    if _waiting_is_cheap(grad.device):
        return factor if bool(is_same) else None
    return torch.where(is_same, factor, torch.nan)


def _waiting_is_cheap(device: torch.device) -> bool:
    return device.type == "cpu"


def _no_entries(hidden: Tensor) -> Tensor:
    dtype = hidden.dtype if hidden.dtype is torch.float64 else torch.float32
    return torch.empty(0, dtype=dtype, device=hidden.device)


def _reduce(tensor: Tensor, op: Any, group: dist.ProcessGroup) -> None:
    if group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)
