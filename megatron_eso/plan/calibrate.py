"""Fits the constants of the speed model to measured runs, with leave-one-out errors.

The fit minimizes squared log errors of the step time plus a weak pull towards the profile's prior. So a
constant about which the runs say nothing stays where it was. One that the prior sets to 0 also stays,
because 0 has no logarithm. A left-out run shows how well the model predicts a run it has not seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from megatron_eso.plan.hardware import Constants, Hardware
from megatron_eso.plan.job import Job
from megatron_eso.plan.step_time import step_time

# Moving a constant by the factor FREEDOM (one standard deviation) costs as much as an error of NOISE in
# one run.
FREEDOM, NOISE = 1.6, 0.05
NAMES = [item.name for item in fields(Constants)]
SHARES = {"gemm_efficiency", "fp8_efficiency", "attention_efficiency", "memory_efficiency"}


@dataclass(frozen=True)
class Measured:
    """A run and the step time it really took."""

    name: str
    job: Job
    step_seconds: float


@dataclass(frozen=True)
class Comparison:
    """Measured against predicted step time of one run."""

    name: str
    measured_seconds: float
    predicted_seconds: float

    @property
    def error(self) -> float:
        """Relative error of the predicted speed (1 / time)."""
        return self.measured_seconds / self.predicted_seconds - 1


@dataclass(frozen=True)
class Calibration:
    """Fitted constants with their fit and their leave-one-out errors."""

    constants: Constants
    fitted: list[Comparison]
    left_out: list[Comparison]

    @property
    def mean_error(self) -> float:
        """Mean absolute leave-one-out error."""
        return float(np.mean([abs(row.error) for row in self.left_out]))

    @property
    def worst_error(self) -> float:
        """Largest absolute leave-one-out error."""
        return max(abs(row.error) for row in self.left_out)


def calibrate(runs: Sequence[Measured], hardware: Hardware) -> Calibration:
    """Return the constants that fit ``runs`` best, with leave-one-out errors."""
    left_out = []
    for index, run in enumerate(runs):
        others = [other for i, other in enumerate(runs) if i != index]
        constants = fit_constants(others, hardware) if others else hardware.prior
        left_out.append(compare(run, replace(hardware, constants=constants)))
    constants = fit_constants(runs, hardware)
    fitted = [compare(run, replace(hardware, constants=constants)) for run in runs]
    return Calibration(constants, fitted, left_out)


def compare(run: Measured, hardware: Hardware) -> Comparison:
    """Return the prediction for one run beside its measurement."""
    return Comparison(run.name, run.step_seconds, step_time(run.job, hardware).total)


def fit_constants(runs: Sequence[Measured], hardware: Hardware) -> Constants:
    """Return the best constants: Gauss-Newton on their logarithms with a damped step."""
    start = np.log([getattr(hardware.prior, name) for name in _free(hardware)])
    point, damping = start.copy(), 1e-3
    residual = _residuals(point, start, runs, hardware)
    for _ in range(40):
        jacobian = _jacobian(point, start, runs, hardware, residual)
        normal = jacobian.T @ jacobian
        step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -jacobian.T @ residual)
        trial = _inside(point + step, hardware)
        tried = _residuals(trial, start, runs, hardware)
        gain = residual @ residual - tried @ tried
        if gain > 0:
            point, residual, damping = trial, tried, damping / 4
            if gain < 1e-7:
                break
        else:
            damping *= 8
            if damping > 1e6:
                break
    return _constants(point, hardware)


def _free(hardware: Hardware) -> list[str]:
    """Return the names of the constants that are fitted."""
    return [name for name in NAMES if getattr(hardware.prior, name) > 0]


def _residuals(
    point: np.ndarray, start: np.ndarray, runs: Sequence[Measured], hardware: Hardware
) -> np.ndarray:
    fitted = replace(hardware, constants=_constants(point, hardware))
    errors = [np.log(step_time(r.job, fitted).total / r.step_seconds) / NOISE for r in runs]
    return np.array([*errors, *((point - start) / np.log(FREEDOM))])


def _jacobian(
    point: np.ndarray,
    start: np.ndarray,
    runs: Sequence[Measured],
    hardware: Hardware,
    residual: np.ndarray,
) -> np.ndarray:
    columns = []
    for index in range(len(point)):
        moved = point.copy()
        moved[index] += 1e-4
        columns.append((_residuals(moved, start, runs, hardware) - residual) / 1e-4)
    return np.stack(columns, axis=1)


def _constants(point: np.ndarray, hardware: Hardware) -> Constants:
    fitted = zip(_free(hardware), np.exp(point), strict=True)
    return replace(hardware.prior, **{name: float(value) for name, value in fitted})


def _inside(point: np.ndarray, hardware: Hardware) -> np.ndarray:
    """Return the point with shares of a peak kept below one."""
    limits = [0.0 if name in SHARES else np.inf for name in _free(hardware)]
    return np.minimum(point, limits)
