"""Formula against simulation, and both against what is published."""

from dataclasses import replace

import pytest

from megatron_eso.errors import ConfigError
from megatron_eso.plan.goodput import (
    Failures,
    best_interval,
    expected_share,
    simulate,
    what_it_is_worth,
)


def mean_share(failures: Failures) -> float:
    return sum(simulate(failures, days=300, seed=seed).share for seed in range(4)) / 4


@pytest.mark.parametrize("num_gpus", [1024, 2048, 4096, 8192, 16384])
@pytest.mark.parametrize("rate", [2.3, 3.8, 6.5])
def test_the_formula_is_within_a_point_of_the_simulation(num_gpus, rate):
    failures = Failures(num_gpus=num_gpus, failures_per_1000_node_days=rate, num_spares=50)
    assert expected_share(failures) == pytest.approx(mean_share(failures), abs=0.01)


def test_llama_3_is_above_ninety_percent_as_published():
    assert mean_share(Failures(num_gpus=16384)) > 0.90


def test_the_rate_gives_llama_3s_419_stops_in_54_days():
    assert Failures(num_gpus=16384).failures_per_second * 54 * 86400 == pytest.approx(419, rel=0.01)


def test_the_best_interval_is_best():
    failures = Failures(num_gpus=16384)
    best = best_interval(failures)
    shares = [
        expected_share(replace(failures, save_interval_seconds=best * f))
        for f in (0.5, 0.8, 1, 1.25, 2)
    ]
    assert max(shares) - shares[2] < 1e-4


def test_without_failures_all_time_is_training():
    failures = Failures(failures_per_1000_node_days=0.0)
    assert expected_share(failures) == simulate(failures, days=10).share == 1.0


@pytest.mark.parametrize("num_gpus", [8, 16384, 100_000])
@pytest.mark.parametrize("rack", [0.0, 0.2])
def test_time_is_training_repeated_down_or_stalled_and_nothing_else(num_gpus, rack):
    failures = Failures(num_gpus=num_gpus, rack_probability=rack, burst_probability=0.2)
    result = simulate(failures, days=50)
    used = result.share + (result.lost_seconds + result.down_seconds) / (50 * 86400)
    assert 0.9 < used <= 1.01  # the rest are the stalls of saves


def test_bursts_racks_and_too_few_spares_cost_time():
    calm = Failures(num_gpus=16384, num_spares=4)
    assert mean_share(replace(calm, burst_probability=0.5)) < mean_share(calm)
    racks = replace(calm, rack_probability=0.3)
    assert simulate(racks, days=100).waiting_seconds > 0
    assert mean_share(racks) < mean_share(calm)


def test_a_spare_is_worth_most_where_there_is_none():
    few = what_it_is_worth(Failures(num_gpus=16384, num_spares=0), days=60)["one more spare node"]
    many = what_it_is_worth(Failures(num_gpus=16384, num_spares=40), days=60)["one more spare node"]
    assert few > 1.0 > abs(many)


def test_local_copies_lose_less_training():
    shared = Failures(num_gpus=16384, node_lost_probability=0.2, durable_lag_seconds=600)
    local = replace(shared, local_interval_seconds=60.0)
    assert simulate(local).lost_seconds < 0.5 * simulate(shared).lost_seconds


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError, match="burst_probability"):
        simulate(Failures(burst_probability=1.5))
    with pytest.raises(ConfigError, match="restart_seconds"):
        simulate(Failures(restart_seconds=-1))
