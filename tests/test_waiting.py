"""How long ranks wait for each other: no shorter than the settings allow one of them to take."""

import pytest

from megatron_eso.config import derive, load_config

CONTEXT = ["parallel.context=2"]  # a layout with one of our own groups
SLOW_START = ["resilience.setup_timeout_seconds=4000"]
SLOW_SAVE = ["checkpoint.asynchronous=false", "checkpoint.timeout_seconds=5000"]


@pytest.mark.parametrize(
    ("overrides", "longest"),
    [
        pytest.param([], 600, id="as-it-is"),
        pytest.param(SLOW_START, 4000, id="a-slow-start"),
        pytest.param(["resilience.min_timeout_seconds=3000"], 3000, id="no-limit-below"),
        pytest.param(SLOW_SAVE, 5000, id="ranks-that-write-before-they-go-on"),
        pytest.param(["checkpoint.timeout_seconds=5000"], 600, id="writers-beside-the-ranks"),
    ],
)
def test_ranks_wait_longer_than_the_launcher(overrides, longest):
    """The launcher, which shows where ranks stand, must end a hang before NCCL ends the process."""
    waits = derive.waiting_seconds(load_config(None, ["train.steps=1", *overrides]))
    assert longest < waits <= longest + 120


@pytest.mark.slow
def test_every_group_waits_as_long_as_a_start_may_take(two_ranks):
    for waits in two_ranks.run("seconds_that_groups_wait", [*CONTEXT, *SLOW_START]):
        assert min(waits.values()) > 4000, waits
