"""Sums and counts of the loss, which are added over micro-batches and ranks and divided once.

loss = sequential nats / tokens of sequential rows + weighted diffusion nats / tokens of diffusion rows

Both denominators count all valid tokens of those rows in the global batch, not only the masked ones
(arXiv 2506.01928, official code).
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from megatron_eso.objective.rows import StackRows


@dataclass(frozen=True)
class TokenCounts:
    """Valid tokens of the global batch: the two denominators."""

    diffusion: int
    sequential: int


def loss_sums(log_probs: Float[Tensor, " N"], rows: StackRows) -> Float[Tensor, " 2"]:
    """Return [weighted diffusion nats, sequential nats] of a micro-batch.

    Args:
        log_probs: log-probability of each entry's target, in the order of ``rows.loss_entries``.
        rows: the micro-batch.
    """
    nats = -log_probs * rows.loss_weights
    zero = nats.new_zeros(())
    diffusion = torch.where(rows.loss_is_sequential, zero, nats).sum()
    sequential = torch.where(rows.loss_is_sequential, nats, zero).sum()
    return torch.stack([diffusion, sequential])


def mean_loss(sums: Float[Tensor, " 2"], counts: TokenCounts) -> Float[Tensor, ""]:
    """Return the loss: each sum divided by the global number of tokens of its rows."""
    return sums[0] / max(counts.diffusion, 1) + sums[1] / max(counts.sequential, 1)


def with_loss_gradient(rows: StackRows, counts: TokenCounts) -> StackRows:
    """Return the rows with d mean_loss / d log_probs, which does not depend on the log-probabilities."""
    log_probs = torch.zeros_like(rows.loss_weights, requires_grad=True)
    with torch.enable_grad():
        loss = mean_loss(loss_sums(log_probs, rows), counts)
    return replace(rows, loss_gradient=torch.autograd.grad(loss, log_probs)[0])
