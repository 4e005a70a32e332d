"""IsoFLOP fits: a parabola in log N for each budget, its minimum, and power laws through the minima.

Source: Hoffmann et al. 2022 (Chinchilla, arXiv 2203.15556), approach 2; arXiv 2602.15014 fits the same.
A budget is refused with the reason if it has fewer than three sizes, if its parabola opens downwards, or if
the minimum is outside the measured sizes.

Letters: N = weights, D = data tokens, C = training FLOPs; losses are in nats per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_SIZES, MIN_BUDGETS = 3, 2


@dataclass(frozen=True)
class Minimum:
    """Best size at one budget, or why there is none; then the values are None."""

    budget: float
    """C."""
    parameters: float | None
    """N*."""
    loss: float | None
    """Of the parabola at N*."""
    tokens: float | None
    """D*."""
    coefficients: tuple[float, ...] | None
    """(a, b, c, center) of a u^2 + b u + c with u = log N - center; see :func:`parabola`."""
    reason: str = ""
    """Why the budget is refused; empty: it is not."""


@dataclass(frozen=True)
class PowerLaw:
    """y = exp(log_scale) x ^ exponent."""

    log_scale: float
    exponent: float
    interval: tuple[float, float] | None = None
    """Of the exponent, 5 to 95 % of the bootstrap; None: too few points, or no bootstrap."""
    samples: tuple[tuple[float, float], ...] = ()
    """(log_scale, exponent) of each bootstrap sample."""

    def at(self, x: float) -> float:
        """Return y at ``x``."""
        return float(np.exp(self.log_scale + self.exponent * np.log(x)))

    def interval_at(self, x: float, level: float = 0.9) -> tuple[float, float] | None:
        """Return the interval of y at ``x`` that holds a share ``level`` of samples, if there are any."""
        if not self.samples:
            return None
        values = [np.exp(a + b * np.log(x)) for a, b in self.samples]
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


def minimum_of_budget(
    budget: float, parameters: Sequence[float], losses: Sequence[float], tokens: Sequence[float]
) -> Minimum:
    """Return the minimum of loss over size at a budget.

    Args:
        budget: C.
        parameters: N of each run.
        losses: of each run.
        tokens: D of each run, from which D* is interpolated at N*.
    """
    if len(set(parameters)) < MIN_SIZES:
        return _refused(budget, f"{len(set(parameters))} sizes; at least {MIN_SIZES} are needed")
    x, y = np.log(parameters), np.asarray(losses, float)
    # Centered, since the fit loses digits at log N around 18.
    center = float(x.mean())
    a, b, c = np.polyfit(x - center, y, 2)
    if a <= 0:
        return _refused(budget, "the parabola opens downwards: no minimum")
    best = center - b / (2 * a)
    if not x.min() < best < x.max():
        side = "smallest" if best <= x.min() else "largest"
        return _refused(
            budget,
            f"the minimum ({np.exp(best):.3g} parameters) is outside the measured sizes, beyond the "
            f"{side}: add sizes there",
        )
    # At fixed FLOPs, D is a smooth function of N: nearly a line in logs between two runs.
    order = np.argsort(x)
    log_tokens = np.interp(best, x[order], np.log(np.asarray(tokens, float))[order])
    coefficients = (float(a), float(b), float(c), center)
    loss = float(c - b * b / (4 * a))
    return Minimum(budget, float(np.exp(best)), loss, float(np.exp(log_tokens)), coefficients)


def parabola(coefficients: Sequence[float], parameters: np.ndarray) -> np.ndarray:
    """Return the fitted losses at sizes N; ``coefficients`` are those of :class:`Minimum`."""
    a, b, c, center = coefficients
    x = np.log(parameters) - center
    return a * x * x + b * x + c


def power_law(
    x: Sequence[float], y: Sequence[float], *, num_bootstrap: int = 0, seed: int = 0
) -> PowerLaw | None:
    """Return the least-squares line in logs; None for fewer than two distinct x.

    Args:
        x: positive.
        y: positive, one for each x.
        num_bootstrap: samples for the intervals. They need three points: with fewer there are none.
        seed: of the bootstrap.
    """
    log_x, log_y = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    if len(set(log_x)) < MIN_BUDGETS:
        return None
    exponent, log_scale = np.polyfit(log_x, log_y, 1)
    if not num_bootstrap or len(log_x) < 3:
        return PowerLaw(float(log_scale), float(exponent))
    draw, samples = np.random.default_rng(seed), []
    residuals = log_y - (log_scale + exponent * log_x)
    # Residuals are drawn, not points: a draw of three points is often one point three times. They are
    # inflated, since the fit of two parameters has made them smaller than the noise.
    residuals = residuals * np.sqrt(len(residuals) / (len(residuals) - 2))
    for _ in range(num_bootstrap):
        noisy = log_scale + exponent * log_x + draw.choice(residuals, len(residuals))
        slope, offset = np.polyfit(log_x, noisy, 1)
        samples.append((float(offset), float(slope)))
    low, high = np.quantile([slope for _, slope in samples], [0.05, 0.95])
    return PowerLaw(float(log_scale), float(exponent), (float(low), float(high)), tuple(samples))


def compute_multiplier(
    budgets: Sequence[float],
    losses: Sequence[float],
    reference_budgets: Sequence[float],
    reference_losses: Sequence[float],
) -> list[float]:
    """Return how many times the reference's compute an objective needs for the same loss.

    At each budget of the objective, its power law L(C) gives a loss, and the law of the reference gives
    the compute for that loss. So it is the reference that is extrapolated.

    Args:
        budgets: C of the objective's minima.
        losses: loss at each of these.
        reference_budgets: C of the reference's minima.
        reference_losses: loss at each of these.

    Returns:
        One number for each budget; none if one of the laws is missing or does not fall.
    """
    law, reference = power_law(budgets, losses), power_law(reference_budgets, reference_losses)
    if law is None or reference is None or law.exponent >= 0 or reference.exponent >= 0:
        return []
    found = []
    for budget in budgets:
        needed = (np.log(law.at(budget)) - reference.log_scale) / reference.exponent
        found.append(float(budget / np.exp(needed)))
    return found


def _refused(budget: float, reason: str) -> Minimum:
    return Minimum(budget, None, None, None, None, reason)
