"""Formula against simulation, and both against what is published."""

import math
from dataclasses import replace

import pytest

from megatron_eso.errors import ConfigError
from megatron_eso.plan.commands import goodput_command
from megatron_eso.plan.estimate import best_save_every_steps, make_plan, run_failures
from megatron_eso.plan.goodput import (
    Failures,
    best_interval,
    expected_share,
    simulate,
    what_it_is_worth,
)
from megatron_eso.plan.hardware import load_hardware
from megatron_eso.plan.step_time import step_time
from tests.plan.jobs import job

H100 = load_hardware("h100")


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


def saving(every: int | None, *, gpus: int = 512, steps: int = 100_000, **checkpoint):
    base = job(gpus=gpus)
    train = replace(base.config.train, save_every_steps=every, steps=steps)
    settings = replace(base.config.checkpoint, **checkpoint)
    return replace(base, config=replace(base.config, train=train, checkpoint=settings))


@pytest.mark.parametrize("intervals_per_failure", [0.05, 0.5, 1.0, 2.0])
def test_the_formula_holds_for_saves_that_are_too_rare(intervals_per_failure):
    failures = Failures(num_gpus=4096, num_spares=500)
    rare = intervals_per_failure / failures.failures_per_second
    failures = replace(failures, save_interval_seconds=rare)
    simulated = sum(simulate(failures, days=1500, seed=seed).share for seed in range(4)) / 4
    assert expected_share(failures) == pytest.approx(simulated, abs=0.01)


def test_a_plan_counts_the_runs_own_saves():
    plans = [make_plan(saving(every), H100) for every in (100, 2000, 50_000)]
    for plan, every in zip(plans, (100, 2000, 50_000), strict=True):
        step = plan.time.total - plan.time.checkpoint
        assert plan.failures.save_interval_seconds == pytest.approx(every * step)
        assert plan.goodput == expected_share(plan.failures)
        assert plan.days == pytest.approx(100_000 * step / 86400 / plan.goodput)
    assert plans[0].goodput > plans[1].goodput > plans[2].goodput
    assert plans[0].days < plans[1].days < plans[2].days


def test_without_saves_a_failure_costs_everything_since_the_start():
    plan = make_plan(saving(None), H100)
    assert plan.failures.save_interval_seconds == pytest.approx(100_000 * step_seconds(None))
    assert plan.goodput < make_plan(saving(50_000), H100).goodput
    endless = make_plan(saving(None, steps=10**9), H100)
    assert math.isfinite(endless.days) and endless.goodput < 1e-9


def step_seconds(every: int | None) -> float:
    return step_time(saving(every), H100).total


def test_a_save_interval_far_from_the_best_is_mentioned_with_the_best():
    step = step_seconds(1)
    best = best_save_every_steps(saving(1), run_failures(saving(1), H100, step), step)
    for every in (None, 50_000):
        assert any(
            f"save_every_steps={best} " in w for w in make_plan(saving(every), H100).warnings
        )
    assert not any("save_every_steps" in w for w in make_plan(saving(2 * best), H100).warnings)
    short = make_plan(saving(None, gpus=8, steps=10), H100)
    assert not any("save_every_steps" in w for w in short.warnings)


def test_node_local_copies_of_the_run_count():
    rare, local = saving(50_000), saving(50_000, local_folder="/dev/shm", local_every_steps=20)
    assert make_plan(local, H100).goodput > make_plan(rare, H100).goodput + 0.01


def test_saves_are_never_more_frequent_than_they_finish():
    quick = Failures(num_gpus=16384, save_stall_seconds=0.001, durable_lag_seconds=90)
    assert best_interval(quick) == 90


def test_the_question_of_goodput_is_about_the_run():
    rare, often = (goodput_command(saving(every).config, 512, H100) for every in (50_000, 500))
    assert rare.data["formula"] < often.data["formula"]
    assert often.data["formula"] == make_plan(saving(500), H100).goodput
    assert rare.data["best_formula"] == pytest.approx(often.data["best_formula"])
    assert rare.data["assumptions"]["save_stall_seconds"] < 1  # a 512th of the model, not 6 s
    assert f"save_every_steps={rare.data['best_save_every_steps']}" in rare.text
