"""Log-probability of a target token when the vocabulary is split over tensor ranks.

Letters: N = entries with loss, V = padded vocabulary, T = tensor ranks; a rank holds V/T columns.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def target_log_probs(
    logits: Tensor, targets: Tensor, *, num_real_tokens: int, group: dist.ProcessGroup
) -> Tensor:
    """Return log p(target) of each entry, normalised over the real tokens.

    The mask token and the padded columns are left out of the normalisation: they can never be a
    token of the data, and leaving them in would shift every likelihood.

    Args:
        logits: [N, V/T], this rank's columns; overwritten.
        targets: [N] token ids, below ``num_real_tokens``.
        num_real_tokens: ids that count: the vocabulary without the mask token, whose id is the last.
        group: tensor-parallel group.

    Returns:
        [N] float32, the same on every tensor rank; differentiable with respect to ``logits``.
    """
    return _TargetLogProbs.apply(logits, targets, num_real_tokens, group)


class _TargetLogProbs(torch.autograd.Function):
    """log softmax at one column, computed in place so that only one [N, V/T] buffer exists."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, num_real_tokens: int, group: dist.ProcessGroup
    ) -> Tensor:
        first = group.rank() * logits.shape[1]
        ctx.dtype = logits.dtype
        work = logits.detach() if logits.dtype in (torch.float32, torch.float64) else logits.float()
        work[:, max(num_real_tokens - first, 0) :] = -torch.inf
        highest = work.amax(dim=1)
        _reduce(highest, dist.ReduceOp.MAX, group)
        local = targets - first
        is_here = (local >= 0) & (local < work.shape[1])
        local = local.clamp(0, work.shape[1] - 1)
        work.sub_(highest[:, None])
        target_logit = work.gather(1, local[:, None])[:, 0].masked_fill(~is_here, 0.0)
        work.exp_()
        total = work.sum(dim=1)
        both = torch.stack([target_logit, total])
        _reduce(both, dist.ReduceOp.SUM, group)
        work.div_(both[1][:, None])  # now the probabilities, kept for the backward pass
        ctx.save_for_backward(work, local, is_here)
        return both[0] - both[1].log()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        probs, local, is_here = ctx.saved_tensors
        grad = grads[0]
        grad_logits = probs.mul_(-grad[:, None])
        grad_logits.scatter_add_(1, local[:, None], (grad * is_here)[:, None])
        return grad_logits.to(ctx.dtype), None, None, None


def _reduce(tensor: Tensor, op: Any, group: dist.ProcessGroup) -> None:
    if group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)
