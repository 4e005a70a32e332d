"""Exchanges between pipeline stages also finish under NCCL's rules; these tests have no NCCL."""

import pytest

from tests.exchange_order import Note, stuck

LAYERS = ["model.num_layers=8", "train.global_batch_rows=32", "train.micro_batch_rows=2"]
TWO = {
    "one-chunk": ["parallel.pipeline=2"],
    "interleaved": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    "interleaved-by-layers": ["parallel.pipeline=2", "parallel.virtual_pipeline=4"],
}
FOUR = {
    "one-chunk": ["parallel.pipeline=4"],
    "interleaved": ["parallel.pipeline=4", "parallel.virtual_pipeline=2"],
    "data": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("evaluates_first", [False, True], ids=["training", "evaluation-first"])
@pytest.mark.parametrize("layout", TWO)
def test_two_stages_come_to_an_end(two_ranks, layout, evaluates_first):
    run(two_ranks, TWO[layout], evaluates_first)


@pytest.mark.slow
@pytest.mark.parametrize("layout", FOUR)
def test_four_ranks_come_to_an_end(four_ranks, layout):
    run(four_ranks, FOUR[layout], evaluates_first=False)


def run(pool, overrides, evaluates_first):
    job = "exchange_order.of_a_run"
    notes = pool.run(job, [*LAYERS, "parallel.overlap=true", *overrides], evaluates_first)
    assert all(any(note[0] == "send" for note in of_rank) for of_rank in notes)
    assert not stuck(notes)


def exchange(what: str, number: int, group: str, other: int) -> Note:
    return what, number, group, other


def wait(number: int) -> Note:
    return "wait", number, "", -1


CAPTURE: Note = "capture", 9, "", -1


@pytest.mark.parametrize(
    ("first", "second", "is_stuck"),
    [
        pytest.param(
            [exchange("send", 0, "a", 1), exchange("receive", 1, "a", 1), wait(0), wait(1)],
            [exchange("receive", 0, "a", 0), exchange("send", 1, "a", 0), wait(0), wait(1)],
            False,
            id="in-order",
        ),
        pytest.param(
            [exchange("send", 0, "a", 1), exchange("receive", 1, "a", 1), wait(0), wait(1)],
            [exchange("send", 0, "a", 0), exchange("receive", 1, "a", 0), wait(0), wait(1)],
            True,
            id="both-send-first",
        ),
        pytest.param(
            [exchange("send", 0, "a", 1), exchange("receive", 1, "b", 1), wait(0), wait(1)],
            [exchange("send", 0, "b", 0), exchange("receive", 1, "a", 0), wait(0), wait(1)],
            True,
            id="communicators-are-made-in-another-order",
        ),
        pytest.param(
            [exchange("receive", 0, "a", 1), CAPTURE, exchange("send", 1, "b", 1), wait(0)],
            [exchange("send", 0, "a", 0), wait(0), exchange("receive", 1, "b", 0), wait(1)],
            False,
            id="a-capture-waits-for-what-is-on-its-way",
        ),
        pytest.param(
            [exchange("send", 0, "a", 1), wait(0), exchange("receive", 1, "a", 1), CAPTURE,
             exchange("send", 2, "a", 1), wait(1)],
            [exchange("receive", 0, "a", 0), exchange("send", 1, "a", 0), wait(0),
             exchange("receive", 2, "a", 0), wait(2)],
            False,
            id="a-capture-with-an-answer-under-way",
        ),
        pytest.param(
            [exchange("send", 0, "a", 1), exchange("receive", 1, "a", 1), CAPTURE,
             exchange("send", 2, "a", 1)],
            [exchange("receive", 0, "a", 0), wait(0), CAPTURE, exchange("receive", 2, "a", 0), wait(2),
             exchange("send", 1, "a", 0)],
            True,
            id="a-capture-waits-for-an-answer-that-needs-more",
        ),
    ],
)  # fmt: skip
def test_the_rules_find_what_would_wait_for_ever(first, second, is_stuck):
    assert bool(stuck([first, second])) is is_stuck
