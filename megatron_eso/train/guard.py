"""The step guard: runs a step with a bad loss or gradient again; if still bad, skips it or stops the run.

Everything random in a step is a function of (seed, step, row), and a step that is not applied leaves no
trace. So a second run gives the same numbers, except for rounding on a GPU, unless hardware or memory
failed in one of the two. That tells a transient fault from a bad batch.
"""

import logging
import statistics
from collections.abc import Callable
from enum import Enum
from pathlib import Path

from megatron_eso.errors import TrainingError
from megatron_eso.launch import events
from megatron_eso.train.session import Session
from megatron_eso.train.step import Quality, ReadRows, StepReport, finite_is_good, train_step

log = logging.getLogger(__name__)
_ROUNDING = 0.01  # share of the loss; sums whose order depends on timing differ by far less


class Verdict(Enum):
    """What to do with a step that is bad twice."""

    WARN = "warn"
    STOP = "stop"
    SKIP = "skip"
    ROLLBACK = "rollback"


class StepGuard:
    """Runs training steps and judges them. All ranks see the same numbers, so they decide the same."""

    def __init__(
        self, session: Session, read: ReadRows, go_back: Callable[[], bool], run: Path
    ) -> None:
        """Prepare to judge.

        Args:
            session: the run.
            read: reads the rows of a step.
            go_back: loads the newest checkpoint; returns False if there is none.
            run: run folder; rank 0 writes the ledger in it.
        """
        self._session, self._read, self._go_back, self._run = session, read, go_back, run
        self._settings = session.config.resilience

    def step(self) -> StepReport | None:
        """Run the next step; return its report, or None if its batch was left out.

        Raises:
            TrainingError: if the step is bad twice and the policy is to stop, to go back where there is
                no checkpoint, or to leave out one batch more than ``resilience.max_skipped_steps``.
        """
        state = self._session.state
        if state.step in state.left_out:
            state.step += 1
            return None
        report = train_step(self._session, self._read, self._judge)
        if not report.is_applied:
            report = self._again(report)
        if report is not None and self._settings.spike_window:
            state.losses = [*state.losses, report.loss][-self._settings.spike_window :]
        return report

    def _again(self, first: StepReport) -> StepReport | None:
        """Run a bad step a second time; return its report if it was applied."""
        what = self._describe(first)
        self._tell("step_repeated", f"step {first.step}: {what}; the step is run again", first)
        may_spike = self._settings.on_spike == Verdict.WARN.value
        second = train_step(self._session, self._read, finite_is_good if may_spike else self._judge)
        if not second.is_applied:
            self._leave_out(self._verdict(second), second)
            return None
        gave = f"loss {second.loss:.6g}, gradient norm {second.grad_norm:.6g}"
        is_same = abs(second.loss - first.loss) <= _ROUNDING * abs(second.loss)
        if is_same and first.quality is Quality.SPIKE:
            why = "resilience.on_spike=warn" if self._is_spike(second.loss) else "no spike any more"
            self._tell(
                "spike",
                f"step {first.step}: {what}; the second run gave {gave}, and was applied ({why})",
                second,
            )
        else:
            self._tell(
                "transient", f"step {first.step}: the second run gave {gave}, and was applied. The fault "
                "was transient: memory or an arithmetic unit of a node may be failing", second,
            )  # fmt: skip
        return second

    def _leave_out(self, verdict: Verdict, report: StepReport) -> None:
        state, settings = self._session.state, self._settings
        what = f"step {report.step}: {self._describe(report)}, twice"
        asked = "on_spike" if report.quality is Quality.SPIKE else "on_nonfinite"
        if verdict is Verdict.STOP:
            raise TrainingError(
                f"{what}; the update was not applied and step {state.step} is saved. Lower optimizer."
                f"learning_rate={self._session.config.optimizer.learning_rate:g}, use a longer optimizer."
                f"warmup_steps or precision.dtype=fp32, or set resilience.{asked} to skip or rollback"
            )
        if len(state.left_out) >= settings.max_skipped_steps:
            raise TrainingError(
                f"{what}; {len(state.left_out)} batches were left out already "
                f"(resilience.max_skipped_steps={settings.max_skipped_steps}): single batches are not the "
                "cause. Lower optimizer.learning_rate or raise the limit"
            )
        bad = state.step
        if verdict is Verdict.ROLLBACK:
            if not self._go_back():
                every = self._session.config.train.save_every_steps
                raise TrainingError(
                    f"{what}; there is no checkpoint to go back to (resilience.{asked}=rollback): the run "
                    f"has not reached its first save (train.save_every_steps={every}), or no save worked. "
                    f"Lower train.save_every_steps, or set resilience.{asked}=skip"
                )
            event, where = "rollback", f"back to step {state.step}, "
        else:
            state.step += 1
            event, where = "skipped", ""
        state.left_out = sorted({*state.left_out, bad})
        self._tell(event, f"{what}; {where}its batch is left out", report)

    def _judge(self, loss: float, norm: float) -> Quality:
        quality = finite_is_good(loss, norm)
        is_spike = quality is Quality.GOOD and self._is_spike(loss)
        return Quality.SPIKE if is_spike else quality

    def _is_spike(self, loss: float) -> bool:
        losses, settings = self._session.state.losses, self._settings
        if not settings.spike_window or len(losses) < settings.spike_window:
            return False
        mean = statistics.fmean(losses)
        # Where losses hardly differ, a small change must not count as a spike.
        spread = max(statistics.pstdev(losses), 1e-3 * abs(mean))
        return loss > mean + settings.spike_deviations * spread

    def _verdict(self, report: StepReport) -> Verdict:
        settings = self._settings
        return Verdict(
            settings.on_spike if report.quality is Quality.SPIKE else settings.on_nonfinite
        )

    def _describe(self, report: StepReport) -> str:
        values = f"loss {report.loss:.6g}, gradient norm {report.grad_norm:.6g}"
        if report.quality is Quality.NOT_FINITE:
            return f"{values} are not finite"
        mean = statistics.fmean(self._session.state.losses)
        return f"{values}: a spike, the last {len(self._session.state.losses)} have a mean of {mean:.6g}"

    def _tell(self, event: str, text: str, report: StepReport) -> None:
        if self._session.ranks.rank == 0:
            log.warning(text)
            events.record(self._run, event, step=report.step)
