"""The parametric law L(N, D) = E + A / N^a + B / D^b, by a Huber loss on log L from many starts.

Source: Hoffmann et al. 2022 (Chinchilla, arXiv 2203.15556), approach 3: log L as a log-sum-exp, L-BFGS.

Letters: N = weights, D = data tokens, L = loss in nats per token; in code n, d and y are their logarithms.
A point is (log A, log B, log E, a, b).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_eso.errors import DataError, UserError

HUBER_DELTA = 1e-3
FEWEST_RUNS = 6  # for the five numbers of the law
STARTS = tuple(
    (log_a, log_b, log_e, exponent, exponent)
    for log_a, log_b, log_e, exponent in itertools.product(
        (0.0, 5.0, 10.0), (0.0, 5.0, 10.0), (0.0, 1.0), (0.2, 0.5)
    )
)


@dataclass(frozen=True)
class Parametric:
    """A fitted law."""

    E: float
    A: float
    B: float
    a: float
    b: float
    residuals: tuple[float, ...]
    """log(measured) - log(fitted) of each run."""
    intervals: dict[str, tuple[float, float]]
    """5 to 95 % of the bootstrap, for each of E, A, B, a, b; empty without a bootstrap."""

    @property
    def is_determined(self) -> bool:
        """False if E, a or b ended at a bound: then the runs do not say what the law is."""
        return self.E >= 1e-3 and all(0.02 < x < 2.9 for x in (self.a, self.b))

    def at(self, parameters: float, tokens: float) -> float:
        """Return L of a size N after D tokens."""
        return self.E + self.A / parameters**self.a + self.B / tokens**self.b


def fit_parametric(
    parameters: Sequence[float],
    tokens: Sequence[float],
    losses: Sequence[float],
    *,
    num_bootstrap: int = 0,
    seed: int = 0,
) -> Parametric:
    """Return the law that fits best.

    Args:
        parameters: N of each run.
        tokens: D of each run.
        losses: L of each run.
        num_bootstrap: times that the runs are drawn with replacement, for the intervals.
        seed: of these draws.

    Raises:
        DataError: for fewer than ``FEWEST_RUNS`` runs.
        UserError: if scipy is missing.
    """
    n, d, y = (np.log(np.asarray(v, float)) for v in (parameters, tokens, losses))
    if len(y) < FEWEST_RUNS:
        raise DataError(
            f"{len(y)} runs; the law has 5 parameters, so at least {FEWEST_RUNS} are needed"
        )
    best = min((_minimise(np.array(start), n, d, y) for start in STARTS), key=lambda r: r[1])[0]
    intervals = {}
    if num_bootstrap:
        draw, found = np.random.default_rng(seed), []
        for _ in range(num_bootstrap):
            chosen = draw.integers(0, len(y), len(y))
            found.append(_natural(_minimise(best, n[chosen], d[chosen], y[chosen])[0]))
        table = np.array(found)
        for index, name in enumerate(("E", "A", "B", "a", "b")):
            low, high = np.quantile(table[:, index], [0.05, 0.95])
            intervals[name] = (float(low), float(high))
    E, A, B, a, b = _natural(best)
    residuals = tuple(float(r) for r in y - _log_loss(_terms(best, n, d)))
    return Parametric(E, A, B, a, b, residuals, intervals)


def _natural(point: np.ndarray) -> tuple[float, float, float, float, float]:
    log_a, log_b, log_e, a, b = (float(v) for v in point)
    return float(np.exp(log_e)), float(np.exp(log_a)), float(np.exp(log_b)), a, b


def _terms(point: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
    log_a, log_b, log_e, a, b = point
    terms = np.empty((3, len(n)))
    terms[0], terms[1], terms[2] = log_a - a * n, log_b - b * d, log_e
    return terms


def _log_loss(terms: np.ndarray) -> np.ndarray:
    top = terms.max(axis=0)
    return top + np.log(np.exp(terms - top).sum(axis=0))


def _objective(
    point: np.ndarray, n: np.ndarray, d: np.ndarray, y: np.ndarray
) -> tuple[float, np.ndarray]:
    """Return the summed Huber loss of log L and its gradient, both over delta^2 (for conditioning)."""
    terms = _terms(point, n, d)
    fitted = _log_loss(terms)
    error = (fitted - y) / HUBER_DELTA
    clipped = np.minimum(np.maximum(error, -1.0), 1.0)
    # error^2 / 2 where it is small, |error| - 1/2 elsewhere
    value = clipped @ (error - 0.5 * clipped)
    slope = clipped * np.exp(terms - fitted) / HUBER_DELTA
    return float(value), np.array([*slope.sum(axis=1), -(slope[0] @ n), -(slope[1] @ d)])


def _minimise(
    start: np.ndarray, n: np.ndarray, d: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, float]:
    try:
        from scipy.optimize import minimize
    except ImportError:
        raise UserError("this fit needs scipy: pip install -e '.[plots]'") from None
    # Exponents stay in (0, 3): a flat or a vertical term is no law.
    bounds = [(-20, 60), (-20, 60), (-10, 5), (0.01, 3), (0.01, 3)]
    # About the mean of the log-sizes, a change of an exponent does not move its whole term. So fewer steps.
    middle = np.array([n.mean(), d.mean()])
    result = minimize(
        _objective,
        _moved(start, -middle),
        args=(n - middle[0], d - middle[1], y),
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        options={"maxiter": 3000, "maxfun": 6000, "ftol": 1e-13, "gtol": 1e-9},
    )
    return _moved(result.x, middle), float(result.fun)


def _moved(point: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Return the point of the same law for log-sizes (n, d) that are greater by ``by``."""
    log_a, log_b, log_e, a, b = point
    return np.array([log_a + a * by[0], log_b + b * by[1], log_e, a, b])
