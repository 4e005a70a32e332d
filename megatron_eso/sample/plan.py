"""Which positions are decided in which step: pure, and a function of the seed.

Diffusion steps draw how many tokens they decide; what is left goes one at a time from left to right
(eso-lm section 6; arXiv 2506.01928, section 4). Letters: B = rows, L = tokens of a row.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from megatron_eso.errors import ConfigError
from megatron_eso.objective.order import likelihood_order
from megatron_eso.objective.randomness import Stream, uniform, uniform_rows


@dataclass(frozen=True)
class DecodingPlan:
    """An order for each row and how many of its positions each step decides."""

    order: Int[Tensor, "B L"]
    """Positions in the order they enter the model: given tokens first, then step by step."""
    num_given: int
    """Positions that are known from the start, the same number in every row."""
    counts: list[int]
    """Positions decided per step; all positive; they sum to L - num_given."""

    @property
    def num_evaluations(self) -> int:
        """Number of function evaluations (NFE): non-empty steps."""
        return len(self.counts)


def make_plan(
    is_given: Bool[Tensor, "B L"], *, alpha_0: float, num_steps: int, seed: int
) -> DecodingPlan:
    """Return the plan of a batch of rows.

    For t = 1, 1 - 1/T, ..., 1/T with s = t - 1/T, Binomial(left, (alpha_s - alpha_t) / (1 - alpha_t))
    tokens are decided, alpha_t = alpha_0 (1 - t); the rest goes left to right.

    Args:
        is_given: positions that are known; as many in every row.
        alpha_0: expected share of the other positions decided by diffusion, in [0, 1].
        num_steps: diffusion steps T.
        seed: seed of the counts and orders.

    Raises:
        ConfigError: for a setting out of range or rows with different numbers of given tokens.
    """
    if not 0 <= alpha_0 <= 1:
        raise ConfigError(f"alpha_0={alpha_0} must be in [0, 1]")
    length = is_given.shape[1]
    given = is_given.sum(dim=1)
    if int(given.min()) != int(given.max()):
        raise ConfigError("the rows of one batch must have the same number of given tokens")
    left = length - int(given[0])
    if num_steps < 1 or (left and num_steps > left and alpha_0 > 0):
        raise ConfigError(f"num_steps={num_steps} must be between 1 and the {left} open tokens")
    by_diffusion = _binomial_counts(left, alpha_0, num_steps, seed)
    counts = [*by_diffusion, *[1] * (left - sum(by_diffusion))]
    return DecodingPlan(_orders(is_given, sum(by_diffusion), seed), length - left, counts)


def _binomial_counts(left: int, alpha_0: float, num_steps: int, seed: int) -> list[int]:
    """Return the non-zero numbers of tokens decided by the diffusion steps."""
    draws = uniform(seed, 0, 0, Stream.SAMPLE_PLAN, max(left, 1) * num_steps)
    draws = draws.view(num_steps, -1)
    counts = []
    for step in range(num_steps):
        t = 1 - step / num_steps
        keep_now, keep_next = alpha_0 * (1 - t), alpha_0 * (1 - t + 1 / num_steps)
        share = (keep_next - keep_now) / (1 - keep_now)
        count = int((draws[step, :left] < share).sum())
        left -= count
        if count:
            counts.append(count)
    return counts


def _orders(is_given: Tensor, num_diffusion: int, seed: int) -> Int[Tensor, "B L"]:
    """Return each row's order: given in reading order, random ones, the rest in reading order."""
    num_rows, length = is_given.shape
    key = uniform_rows(seed, 0, list(range(num_rows)), Stream.ORDER, length)
    key = torch.where(is_given, torch.inf, key)
    chosen = torch.zeros_like(is_given)
    if num_diffusion:
        chosen.scatter_(1, key.argsort(dim=1)[:, :num_diffusion], True)
    everything = torch.ones_like(is_given)
    order = likelihood_order(chosen, everything, torch.where(chosen, key, 0.0))
    is_first = is_given.gather(1, order)
    return order.gather(1, (~is_first).int().argsort(dim=1, stable=True))
