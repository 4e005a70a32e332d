"""Fits against data not made by us and against known laws."""

import numpy as np
import pytest

from megatron_eso.errors import DataError
from megatron_eso.scaling.isoflop import compute_multiplier, minimum_of_budget, power_law
from megatron_eso.scaling.parametric import fit_parametric

# Minima read off a figure of arXiv 2602.15014: loss and best size (millions) at five budgets.
BUDGETS = [6e18, 1e19, 3e19, 6e19, 1e20]
PUBLISHED = {
    "ar": ([2.856, 2.749, 2.543, 2.433, 2.365], [178, 253, 460, 694, 867], 0.56),
    "mdlm": ([3.376, 3.246, 3.042, 2.920, 2.825], [108, 131, 206, 303, 394], 0.46),
    "duo": ([3.542, 3.421, 3.163, 3.029, 2.937], [89, 124, 246, 348, 470], 0.59),
    "eso": ([3.600, 3.468, 3.230, 3.089, 3.010], [102, 147, 237, 335, 428], 0.50),
}
CHINCHILLA = {"E": 1.69, "A": 406.4, "B": 410.7, "a": 0.34, "b": 0.28}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_minima_give_the_published_exponent(name):
    _, sizes, exponent = PUBLISHED[name]
    assert power_law(BUDGETS, sizes).exponent == pytest.approx(exponent, abs=0.02)


@pytest.mark.parametrize(
    ("name", "low", "high"), [("mdlm", 12, 15), ("duo", 22, 25), ("eso", 31, 36)]
)
def test_compute_for_ars_loss_is_within_the_published_range(name, low, high):
    found = compute_multiplier(BUDGETS, PUBLISHED[name][0], BUDGETS, PUBLISHED["ar"][0])
    assert all(low <= round(value) <= high for value in found), found


def chinchilla_runs(noise=0.0, seed=0):
    sizes, tokens = np.meshgrid(np.logspace(7.5, 10.2, 9), np.logspace(9, 11.7, 9))
    n, d = sizes.ravel(), tokens.ravel()
    loss = (
        CHINCHILLA["E"]
        + CHINCHILLA["A"] / n ** CHINCHILLA["a"]
        + CHINCHILLA["B"] / d ** CHINCHILLA["b"]
    )
    return n, d, loss * np.exp(noise * np.random.default_rng(seed).standard_normal(len(n)))


def test_chinchillas_law_is_recovered_exactly_without_noise():
    fitted = fit_parametric(*chinchilla_runs())
    for name, value in CHINCHILLA.items():
        assert getattr(fitted, name) == pytest.approx(value, rel=0.02), name


@pytest.mark.slow
def test_true_parameters_lie_in_the_bootstrap_intervals_at_the_stated_rate():
    inside = []
    for seed in range(12):
        fitted = fit_parametric(
            *chinchilla_runs(noise=0.005, seed=seed), num_bootstrap=60, seed=seed
        )
        inside += [low <= CHINCHILLA[k] <= high for k, (low, high) in fitted.intervals.items()]
    # 90 % intervals; 60 correlated checks, so allow for chance.
    assert 0.72 <= np.mean(inside) <= 1.0


def test_few_runs_are_refused():
    with pytest.raises(DataError, match="at least 6"):
        fit_parametric([1e8] * 5, [1e9] * 5, [3.0] * 5)


def test_a_parabola_gives_its_minimum():
    sizes = np.logspace(7, 9, 7)
    losses = 3 + 0.1 * (np.log(sizes) - np.log(9e7)) ** 2
    found = minimum_of_budget(1e19, sizes, losses, 1e19 / 6 / sizes)
    assert found.parameters == pytest.approx(9e7)
    assert found.loss == pytest.approx(3.0)
    assert found.tokens == pytest.approx(1e19 / 6 / 9e7)


@pytest.mark.parametrize(
    ("center", "sign", "count", "reason"),
    [
        pytest.param(1e6, 1, 7, "beyond the smallest", id="below"),
        pytest.param(1e11, 1, 7, "beyond the largest", id="above"),
        pytest.param(9e7, -1, 7, "opens downwards", id="maximum"),
        pytest.param(9e7, 1, 2, "at least 3", id="two sizes"),
    ],
)
def test_a_minimum_that_is_not_measured_is_refused_with_the_reason(center, sign, count, reason):
    sizes = np.logspace(7, 9, count)
    losses = 3 + sign * 0.1 * (np.log(sizes) - np.log(center)) ** 2
    found = minimum_of_budget(1e19, sizes, losses, 1e19 / sizes)
    assert found.parameters is None
    assert reason in found.reason


def test_a_power_laws_interval_holds_the_truth_about_nine_times_in_ten():
    inside = 0
    x = np.logspace(18, 20, 6)
    for seed in range(100):
        noise = np.exp(0.05 * np.random.default_rng(1000 + seed).standard_normal(6))
        low, high = power_law(x, 1e-3 * x**0.5 * noise, num_bootstrap=300, seed=seed).interval
        inside += low <= 0.5 <= high
    assert 75 <= inside <= 97
