"""Evaluations see the averaged weights; training continues with its own, without a second copy of them."""

from contextlib import nullcontext
from unittest import mock

import numpy as np
import pytest

from megatron_eso.config.schema import DataConfig, EvalConfig, RunConfig
from megatron_eso.train import validation

LAYOUTS = [
    pytest.param([], id="data 2"),
    pytest.param(["parallel.tensor=2"], id="tensor 2"),
    pytest.param(["parallel.pipeline=2"], id="pipeline 2"),
    pytest.param(["parallel.overlap=true"], id="overlapped"),
]
DTYPES = ["fp32", "bf16"]


def held(two_ranks, layout, dtype, *, fails=False):
    overrides = [*layout, f"precision.dtype={dtype}"]
    return two_ranks.run("average_jobs.used_and_put_back", overrides, fails)


def differ(some, others):
    return any(not np.array_equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_and_masters_are_as_before_bit_for_bit(two_ranks, layout, dtype):
    for found in held(two_ranks, layout, dtype):
        assert differ(found["within"]["weights"], found["before"]["weights"])
        assert not differ(found["within"]["weights"], found["averages"])
        for kind in ("weights", "masters"):
            assert not differ(found["after"][kind], found["before"][kind])


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_goes_on_as_if_nothing_had_been_evaluated(two_ranks, dtype):
    straight = two_ranks.run("train", [f"precision.dtype={dtype}"], 4)[0]
    assert held(two_ranks, [], dtype)[0]["losses"] == straight["losses"][2:]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_run_that_is_stopped_within_saves_its_own_masters(two_ranks, dtype):
    """The weights may stay averaged then: training has ended, and no rank may wait after an error."""
    for found in held(two_ranks, [], dtype, fails=True):
        assert not differ(found["after"]["masters"], found["before"]["masters"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_second_copy_of_the_weights_is_kept(two_ranks, dtype):
    """In fp32 a rank's masters lie in the weights themselves, so it keeps a copy of its share of them."""
    for found in held(two_ranks, [], dtype):
        own = sum(x.nbytes for x in found["before"]["masters"]) if dtype == "fp32" else 0
        assert found["bytes kept"] == own


@pytest.mark.parametrize(
    ("sets", "use_ema", "number"),
    [
        pytest.param({"one": "first", "two": "second"}, True, 1, id="two sets"),
        pytest.param({"one": "first"}, False, 0, id="own weights"),
        pytest.param({}, True, 0, id="no set"),
    ],
)
def test_an_evaluation_writes_the_averages_once_whatever_the_sets(
    monkeypatch, sets, use_ema, number
):
    """Each time, every rank gathers all weights twice."""
    config = RunConfig(data=DataConfig(validation=sets), eval=EvalConfig(use_ema=use_ema))
    average = mock.Mock(applied=mock.Mock(side_effect=lambda chunks: nullcontext()))
    session = mock.Mock(chunks=[], average=average, config=config)
    monkeypatch.setattr(validation, "ValidationReader", lambda path, *args, **kwargs: path)
    monkeypatch.setattr(validation, "_score", lambda session, reader, between: [reader])
    found = validation.Validation(config).scores(session, lambda: None)
    assert found == {name: [path] for name, path in sets.items()}
    assert average.applied.call_count == number
