"""IsoFLOP fits: a parabola in log N per budget, its minimum, and power laws through the minima.

A minimum counts only if it is inside the measured sizes, from at least three sizes, of a parabola that
opens upwards; else the budget is refused with the reason.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_SIZES, MIN_BUDGETS = 3, 2


@dataclass(frozen=True)
class Minimum:
    """Best size at one budget, or why there is none."""

    budget: float
    parameters: float | None
    loss: float | None
    tokens: float | None
    coefficients: tuple[float, ...] | None
    reason: str = ""


@dataclass(frozen=True)
class PowerLaw:
    """y = exp(log_scale) x ^ exponent, with a bootstrap interval of the exponent."""

    log_scale: float
    exponent: float
    interval: tuple[float, float] | None = None
    samples: tuple[tuple[float, float], ...] = ()

    def at(self, x: float) -> float:
        """Return y at ``x``."""
        return float(np.exp(self.log_scale + self.exponent * np.log(x)))

    def interval_at(self, x: float, level: float = 0.9) -> tuple[float, float] | None:
        """Return the bootstrap interval of y at ``x``."""
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
        budget: FLOPs.
        parameters: sizes of the runs.
        losses: nats per token.
        tokens: data tokens of the runs, to place D* on the same curve.
    """
    if len(set(parameters)) < MIN_SIZES:
        return _refused(budget, f"{len(set(parameters))} sizes; at least {MIN_SIZES} are needed")
    x, y = np.log(parameters), np.asarray(losses, float)
    # Centred, or the normal equations lose digits at log N around 18.
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
    # Tokens at fixed FLOPs are a smooth function of N: linear in logs between runs.
    order = np.argsort(x)
    log_tokens = np.interp(best, x[order], np.log(np.asarray(tokens, float))[order])
    coefficients = (float(a), float(b), float(c), center)
    loss = float(c - b * b / (4 * a))
    return Minimum(budget, float(np.exp(best)), loss, float(np.exp(log_tokens)), coefficients)


def parabola(coefficients: Sequence[float], parameters: np.ndarray) -> np.ndarray:
    """Return the fitted loss at sizes."""
    a, b, c, center = coefficients
    x = np.log(parameters) - center
    return a * x * x + b * x + c


def power_law(
    x: Sequence[float], y: Sequence[float], *, num_bootstrap: int = 0, seed: int = 0
) -> PowerLaw | None:
    """Return the least-squares line in logs; None for fewer than two distinct x.

    The bootstrap resamples points; with few points it is wide, as it should be.
    """
    log_x, log_y = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    if len(set(log_x)) < MIN_BUDGETS:
        return None
    exponent, log_scale = np.polyfit(log_x, log_y, 1)
    if not num_bootstrap or len(log_x) < 3:
        return PowerLaw(float(log_scale), float(exponent))
    draw, samples = np.random.default_rng(seed), []
    residuals = log_y - (log_scale + exponent * log_x)
    # Residuals, not points: three points resampled would often be one point three times. Inflated
    # for the two parameters that were fitted.
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

    At each budget of the objective: its power law L(C) gives a loss; the reference's law gives the
    compute for that loss. So the reference is the one that is extrapolated (to less compute).
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
