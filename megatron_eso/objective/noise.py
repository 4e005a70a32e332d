"""The forward process: keep probability, times and weights.

alpha_t = alpha_0 (1 - (1 - eps) t) is the probability that a token is kept at time t in [eps, 1]
(eso-lm: alpha_t = alpha_0 (1 - t) at eps = 0). Sources: arXiv 2506.01928, section 3; for eps, the
official code's noise schedule.
"""

import math
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from megatron_eso.objective.randomness import Stream, uniform

_GOLDEN = (math.sqrt(5) - 1) / 2


def keep_probability(
    time: Float[Tensor, " B"], *, alpha_0: float, eps: float
) -> Float[Tensor, " B"]:
    """Return alpha_t, the probability that a token stays clean."""
    return alpha_0 * (1 - (1 - eps) * time)


def loss_weight(time: Float[Tensor, " B"], *, alpha_0: float, eps: float) -> Float[Tensor, " B"]:
    """Return -alpha_t' / (1 - alpha_t), the weight of the masked entries' negative log-likelihood.

    At eps = 0 this is alpha_0 / (1 - alpha_t), and 1/t for alpha_0 = 1.
    """
    return alpha_0 * (1 - eps) / (1 - keep_probability(time, alpha_0=alpha_0, eps=eps))


def stratified_times(
    seed: int, step: int, rows: list[int], *, num_rows: int, eps: float, draw: int = 0
) -> Float[Tensor, " B"]:
    """Return the times of some of the ``num_rows`` diffusion rows of a global batch.

    Row i gets t = (u + pi(i)) / n, scaled to [eps, 1], with one u per step: one time in each n-th of
    the interval. pi steps through the strata by about n / golden ratio. So in any layout, the times of
    every regular selection of rows (those of one rank, of one micro-batch) spread over the whole
    interval. This balances the number of masked entries, and so the work of the head.

    Args:
        seed: seed of the run.
        step: optimizer step.
        rows: row numbers in [0, num_rows).
        num_rows: diffusion rows of the global batch (n).
        eps: lower end of the times.
        draw: index of a repeated draw.

    Returns:
        float64 times in [eps, 1].
    """
    offset, start = uniform(seed, step, 0, Stream.TIME, 2, draw=draw).tolist()
    first = int(start * num_rows)
    stride = _coprime_near(num_rows)
    strata = [(first + stride * row) % num_rows for row in rows]
    unit = (torch.tensor(strata, dtype=torch.float64) + offset) / num_rows
    return eps + (1 - eps) * unit


@cache
def _coprime_near(num_rows: int) -> int:
    """Return the number nearest n / golden ratio that is coprime with n; of two, the smaller."""
    target = round(num_rows * _GOLDEN)
    strides = (stride for away in range(num_rows) for stride in (target - away, target + away))
    return next(stride for stride in strides if stride > 0 and math.gcd(stride, num_rows) == 1)
