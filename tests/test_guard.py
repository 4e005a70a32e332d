"""What happens to a step that looks wrong, depending on the result of its second run."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron_eso.config.schema import ResilienceConfig, RunConfig, TrainConfig
from megatron_eso.errors import TrainingError
from megatron_eso.launch import events
from megatron_eso.train import guard as guard_module
from megatron_eso.train.guard import StepGuard
from megatron_eso.train.step import Quality, StepReport

NAN = math.nan
REPORT = StepReport(1, Quality.GOOD, 0.0, 0.0, 0.0, 1.0, 1e-3, 10)
SETTINGS = ResilienceConfig(spike_window=4, on_nonfinite="skip")


def state_at(step):
    return SimpleNamespace(step=step, left_out=[], losses=[2.0, 2.01, 1.99, 2.0])


@pytest.fixture
def step(tmp_path, monkeypatch):
    """Return a function that runs a step with these losses, and returns its report and its events."""

    def do(*losses, norms=None, settings=SETTINGS, state=None, go_back=lambda: False):
        left, told = list(zip(losses, norms or [1.0] * len(losses), strict=True)), []

        def train_step(session, read, judge):
            loss, norm = left.pop(0)
            return replace(REPORT, loss=loss, grad_norm=norm, quality=judge(loss, norm))

        monkeypatch.setattr(guard_module, "train_step", train_step)
        monkeypatch.setattr(events, "record", lambda run, event, **values: told.append(event))
        config = RunConfig(resilience=settings, train=TrainConfig(save_every_steps=5))
        session = SimpleNamespace(
            state=state or state_at(0), ranks=SimpleNamespace(rank=0), config=config
        )
        report = StepGuard(session, None, go_back, tmp_path).step()
        assert not left
        return report, told

    return do


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        pytest.param((2.0,), [], id="good"),
        pytest.param((9.0, 9.0), ["step_repeated", "spike"], id="a spike of the batch"),
        pytest.param((9.0, 9.001), ["step_repeated", "spike"], id="the same, rounded otherwise"),
        pytest.param((9.0, 9.05), ["step_repeated", "spike"], id="within a hundredth of the loss"),
        pytest.param((9.0, 2.0), ["step_repeated", "transient"], id="a spike of the machine"),
        pytest.param((NAN, 2.0), ["step_repeated", "transient"], id="nan once"),
        pytest.param((NAN, 9.0), ["step_repeated", "transient"], id="nan once, of a batch with a spike"),
    ],
)  # fmt: skip
def test_the_second_run_tells_the_batch_from_the_machine(step, losses, told):
    report, found = step(*losses)
    assert (report.loss, report.is_applied, found) == (losses[-1], True, told)


def test_a_batch_that_was_left_out_is_passed_over(step):
    state = state_at(3)
    state.left_out = [3]
    assert step(state=state) == (None, [])
    assert state.step == 4


def test_only_the_losses_of_the_window_are_kept(step):
    state = state_at(0)
    step(2.02, state=state)
    assert state.losses == [2.01, 1.99, 2.0, 2.02]
    step(2.02, state=state, settings=replace(SETTINGS, spike_window=0))
    assert state.losses == [2.01, 1.99, 2.0, 2.02]


def test_it_takes_a_full_window_and_more_than_a_thousandth_to_be_a_spike(step):
    state = state_at(0)
    state.losses = [2.0, 2.01, 1.99]
    assert step(9.0, state=state)[1] == []
    state.losses = [2.0] * 4
    assert step(2.01, state=state)[1] == []
    state.losses = [2.0] * 4
    assert step(2.02, 2.02, state=state)[1] == ["step_repeated", "spike"]


def test_a_loss_that_is_infinite_is_no_spike(step):
    settings = replace(SETTINGS, on_spike="stop")
    assert step(math.inf, math.inf, settings=settings) == (None, ["step_repeated", "skipped"])


def test_a_gradient_norm_that_overflowed_once_is_the_machines(step):
    report, told = step(2.0, 2.0, norms=[math.inf, 1.0])
    assert report.is_applied and told == ["step_repeated", "transient"]


@pytest.mark.parametrize("losses", [(NAN, NAN), (9.0, NAN)])
def test_what_is_not_finite_twice_is_left_out(step, losses):
    assert step(*losses) == (None, ["step_repeated", "skipped"])


def test_a_spike_is_left_out_or_ends_the_run_where_that_is_asked_for(step):
    skip = replace(SETTINGS, on_spike="skip")
    assert step(9.0, 9.001, settings=skip) == (None, ["step_repeated", "skipped"])
    assert step(NAN, 9.0, settings=skip) == (None, ["step_repeated", "skipped"])
    with pytest.raises(
        TrainingError, match=r"a spike, .* twice.* set resilience\.on_spike to skip"
    ):
        step(9.0, 9.0, settings=replace(SETTINGS, on_spike="stop"))


ROLLBACK = replace(SETTINGS, on_nonfinite="rollback")


def test_a_batch_without_a_checkpoint_to_go_back_to_is_not_left_out(step):
    state = state_at(3)
    with pytest.raises(
        TrainingError, match=r"on_nonfinite=rollback\).*first save.*save_every_steps=5"
    ):
        step(NAN, NAN, settings=ROLLBACK, state=state)
    assert (state.step, state.left_out) == (3, [])


def test_going_back_leaves_the_bad_batch_out(step):
    state = state_at(3)

    def go_back():
        state.step, state.left_out = 2, [1]
        return True

    report, told = step(NAN, NAN, settings=ROLLBACK, state=state, go_back=go_back)
    assert report is None and told == ["step_repeated", "rollback"]
    assert (state.step, state.left_out) == (2, [1, 3])


def test_as_many_batches_are_left_out_as_the_setting_says(step):
    state, two = state_at(0), replace(SETTINGS, max_skipped_steps=2)
    for _ in range(2):
        step(NAN, NAN, settings=two, state=state)
    assert state.left_out == [0, 1]
    with pytest.raises(TrainingError, match="2 batches were left out already"):
        step(NAN, NAN, settings=two, state=state)
