"""The training loop: step, log, evaluate, save, stop, in plain lines."""

import contextlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_eso.checkpoint.folder import list_folders
from megatron_eso.config.derive import total_steps
from megatron_eso.config.schema import RunConfig
from megatron_eso.errors import (
    STOPPED_EXIT_CODE,
    CheckpointError,
    ConfigError,
    DataError,
    TrainingError,
    UserError,
)
from megatron_eso.files import write_json
from megatron_eso.launch import events
from megatron_eso.launch.environment import Ranks, is_of_job_script
from megatron_eso.launch.heartbeat import Heart
from megatron_eso.parallel.exchange import Rows, any_rank, gather_messages, together
from megatron_eso.parallel.phases import phase
from megatron_eso.resilience.signals import StopRequest
from megatron_eso.train.finished import has_finished, leave_finished
from megatron_eso.train.guard import StepGuard
from megatron_eso.train.keeper import Keeper
from megatron_eso.train.learning_rate import change_of_schedule
from megatron_eso.train.metrics import Metrics, measured_peak
from megatron_eso.train.profile import Profile
from megatron_eso.train.run_folder import RunFolder
from megatron_eso.train.session import build_session, choices
from megatron_eso.train.spare_output import SpareOutput
from megatron_eso.train.stragglers import Stragglers
from megatron_eso.train.training_data import open_training_data
from megatron_eso.train.validation import StopAskedError, Validation

log = logging.getLogger(__name__)
_PROGRESS_SECONDS = 10.0  # between progress notes in the ledger


class Run:
    """A run in progress on this rank."""

    def __init__(self, config: RunConfig, ranks: Ranks, stop: StopRequest | None = None) -> None:
        """Set everything up and load the newest checkpoint. All ranks must call this.

        Args:
            config: the run.
            ranks: this process's place.
            stop: already catches signals; None: begin to catch them.
        """
        begin = time.time()
        if stop is None:
            stop = StopRequest()
            stop.install()
        self.stop = stop
        self.heart = Heart(
            os.environ,
            setup_seconds=config.resilience.setup_timeout_seconds,
            floor_seconds=config.resilience.min_timeout_seconds,
            factor=config.resilience.timeout_factor,
        )
        self.session = build_session(config, ranks, draw_weights=False)
        self.folder = RunFolder(Path(config.folder))
        try:
            self._set_up(begin)
        except UserError as error:
            if self.is_first:
                self._say_why_not_begun(str(error))
                self.folder.give_back()
            raise

    def _set_up(self, begin: float) -> None:
        """Take the folder, open the data, continue or start; only then write to the folder."""
        session, config = self.session, self.session.config
        self._earlier: RunConfig | None = None
        self._on_first_rank(self._take_folder)
        self.had_finished = has_finished(session, self.folder, self._earlier)
        if self.had_finished:
            return
        self._note("setup", began=begin, joined=session.joined)
        self.reader = open_training_data(config, session.torch_device)
        tokenizer = self.reader.manifests[0].tokenizer_sha256
        self.validation = together(lambda: Validation(config, tokenizer), session.torch_device)
        self.keeper = Keeper(session, self.folder, self.reader, self.heart)
        self.keeper.resume_or_start()
        self._compare_lengths()
        content = together(self._tokenizer, session.torch_device)
        self._on_first_rank(lambda: self.folder.describe(session.config, content))
        self.guard = StepGuard(session, self._read, self.keeper.go_back, self.folder.path)
        self.stragglers = Stragglers(config.resilience.straggler_every_steps)
        self.metrics: Metrics | None = None
        self.profile = Profile(config.train, self.folder.path, session.ranks.rank, self._leave_out)
        self._status = SpareOutput("status.json")
        peak = measured_peak(session)
        self._on_first_rank(lambda: self._begin_reports(peak))
        self._noted = time.monotonic()
        self._note("ready", step=session.state.step)

    @property
    def is_first(self) -> bool:
        """True on rank 0, the rank that writes."""
        return self.session.ranks.rank == 0

    def train(self) -> int:
        """Train to the end or until asked to stop; return the exit code."""
        if self.had_finished:
            if self.is_first:
                leave_finished(self.folder, self.session.derived.total_steps)
            self.heart.enter("end")
            return 0
        try:
            return self._train()
        except UserError as error:
            self._say_why(str(error))
            raise

    def _train(self) -> int:
        session, config = self.session, self.session.config
        total = session.derived.total_steps
        if self._must_stop():
            return self._stop_early()
        while session.state.step < total:
            with self.profile.step(session.state.step + 1):
                self.heart.enter("step")
                before = session.state.step
                self._step()
                step = session.state.step
                is_new = (
                    step > before
                )  # else the run went back to a step already evaluated and saved
                try:
                    if is_new and _is_due(step, config.train.eval_every_steps) and step < total:
                        self._evaluate()
                except StopAskedError:
                    return self._stop_early()
                if self._must_stop():
                    return self._stop_early()
                if is_new and _is_due(step, config.train.save_every_steps) and step < total:
                    self._save()
                    if (
                        self._must_stop()
                    ):  # the signal came during the save: this is the last checkpoint
                        return self._stop_early()
                self.keeper.copy_locally()
        return self._finish()

    def _step(self) -> None:
        try:
            report = self.guard.step()
        except TrainingError:
            self._save()  # the good state from before this step
            self.keeper.finish()
            raise
        self.heart.step = self.session.state.step
        if report is None:
            return
        if self.metrics is not None and self.metrics.add(report):
            self._write_status("running", loss=report.loss)
        scalars = self.stragglers.add(report)
        if self.metrics is not None:
            for tag, value in (scalars or {}).items():
                self.metrics.add_scalar(tag, value, report.step)
        if time.monotonic() - self._noted > _PROGRESS_SECONDS:
            self._noted = time.monotonic()
            self._note("progress", step=report.step)

    def _must_stop(self) -> bool:
        """Return whether any rank got a signal. The same exchange advances the save under way."""
        saver = self.keeper.saver
        stop, *saving = any_rank([self.stop.is_set, *saver.flags()], self.session.torch_device)
        saver.advance(*saving)
        self.heart.kept_step = self.keeper.poll_kept_step()
        return stop

    def _between_evaluations(self) -> None:
        self.heart.beat()
        if self._must_stop():
            raise StopAskedError

    def _finish(self) -> int:
        self._save_last("")
        try:
            scores = self._evaluate()
        except StopAskedError:
            return self._stop_early()
        self.heart.enter("end")
        if self.metrics is not None:
            unigram = self.validation.unigram(self.session.config, self.reader)
            for name, score in unigram.items():
                self.metrics.add_scores(self.session.state.step, name, [score])
                scores[name].append(score.as_dict())
            self.metrics.close()
            SpareOutput("evaluation.json").attempt(
                lambda: write_json(self.folder.path / "evaluation.json", scores)
            )
            self._write_status("finished")
            log.info("finished; everything is in %s", self.folder.path)
        self._end("finished")
        self.reader.close()
        return 0

    def _read(self, step: int, rows: list[int]) -> Rows:
        read = self.reader.read(step, rows)
        return Rows(torch.from_numpy(read.tokens), torch.from_numpy(read.is_valid))

    def _on_first_rank(self, action: Callable[[], None]) -> None:
        """Run ``action`` on rank 0; if it fails there, raise its error on all ranks."""
        found: UserError | None = None
        if self.is_first:
            try:
                action()
            except (ConfigError, DataError, CheckpointError) as error:
                found = error
            except OSError as error:
                found = ConfigError(f"folder={self.folder.path} cannot be written: {error}")
        kinds = (ConfigError, DataError, CheckpointError)
        is_found = any_rank([isinstance(found, kind) for kind in kinds], self.session.torch_device)
        for kind, is_it in zip(kinds, is_found, strict=True):
            if is_it:
                raise kind(gather_messages(str(found or ""))[0])

    def _take_folder(self) -> None:
        config, folder = self.session.config, self.folder
        folder.take()
        self._earlier = folder.earlier_config(config)
        if config.checkpoint.resume == "never" and list_folders(folder.checkpoints):
            raise ConfigError(
                f"{folder.checkpoints} holds checkpoints and checkpoint.resume=never; choose another "
                "folder or checkpoint.resume=auto"
            )
        folder.open_log()

    def _tokenizer(self) -> bytes:
        return self.reader.tokenizer_json() if self.is_first else b""

    def _compare_lengths(self) -> None:
        """Refuse a run shorter than the steps it has done; warn if its learning-rate schedule changed."""
        step, total = self.session.state.step, self.session.derived.total_steps
        if step > total:
            raise ConfigError(
                f"{self.folder.path} has done {step} steps, more than the {total} that train.steps or "
                f"train.tokens ask for: ask for at least {step}, or choose another folder; nothing was "
                "changed"
            )
        if self._earlier is not None and 0 < step < total:
            optimizer, before = self.session.config.optimizer, total_steps(self._earlier)
            change = change_of_schedule(step, optimizer, before=before, now=total)
            if change:
                log.warning(change)

    def _save(self) -> None:
        begin = time.perf_counter()
        with phase("checkpoint"):
            stall = self.keeper.save()
        if self.metrics is not None and stall is not None:
            step = self.session.state.step
            self.metrics.add_scalar("time/checkpoint_stall_seconds", stall, step)
            self._leave_out(begin)

    def _evaluate(self) -> dict:
        """Score every validation set; return the scores by the set's name."""
        begin = time.perf_counter()
        self.heart.enter("evaluation")
        with phase("evaluation"):
            found = self.validation.scores(self.session, self._between_evaluations)
        if self.metrics is not None:
            for name, scores in found.items():
                self.metrics.add_scores(self.session.state.step, name, scores)
            self._leave_out(begin)
        self._note("evaluation", seconds=time.perf_counter() - begin)
        return {name: [score.as_dict() for score in scores] for name, scores in found.items()}

    def _leave_out(self, begin: float) -> None:
        """Exclude the time since ``begin`` from the reported speed."""
        if self.metrics is not None:
            self.metrics.pause(begin)

    def _stop_early(self) -> int:
        name, step = self.stop.name or "a signal to another rank", self.session.state.step
        self._save_last(f"stopped by {name} at step {step}, but ")
        if self.is_first:
            log.info(
                "stopped by %s at step %d with a checkpoint, %.1f s after the signal; the same command "
                "continues", name, step, self.stop.seconds_ago,
            )  # fmt: skip
            self._write_status("stopped", reason=self.stop.name)
        self._end("stopped", reason=self.stop.name, seconds=round(self.stop.seconds_ago, 3))
        return STOPPED_EXIT_CODE

    def _save_last(self, before: str) -> None:
        """Save the run's last step; the exit code promises that this checkpoint exists."""
        self._save()
        if not self.keeper.finish():
            raise CheckpointError(
                f"{before}the last checkpoint could not be written under {self.folder.path}: free space "
                "there and run the same command, which continues from the checkpoint before"
            )

    def _say_why_not_begun(self, why: str) -> None:
        """Tell our job script why set-up failed: it treats ranks that leave no status as crashed.

        Without a job script, a refused start changes nothing in the folder.
        """
        if is_of_job_script(os.environ) and self.folder.is_taken():
            with contextlib.suppress(OSError):  # the folder itself may be the problem
                self.folder.write_status("failed", reason=why)

    def _say_why(self, why: str) -> None:
        """Record why the run failed, unless another attempt has taken over the folder."""
        if self.is_first and not self.folder.is_taken():
            self.keeper.release()
            return
        if self.is_first:
            self._write_status("failed", reason=why)
        self._end("failed", reason=why)

    def _end(self, state: str, **facts: object) -> None:
        self.heart.enter("end")
        self.keeper.release()
        self._note("stop", state=state, step=self.session.state.step, **facts)

    def _note(self, event: str, **facts: object) -> None:
        if self.is_first:
            events.record(self.folder.path, event, **facts)

    def _write_status(self, state: str, **facts: object) -> None:
        step, total = self.session.state.step, self.session.derived.total_steps
        self._status.attempt(
            lambda: self.folder.write_status(state, step=step, total_steps=total, **facts)
        )

    def _begin_reports(self, peak: float) -> None:
        """Log what the run is, and open the files for its reports."""
        for line in [*self.session.derived.lines(), *choices(self.session)]:
            log.info(line)
        log.info("matmul peak of all ranks: %.1f GFLOP/s (measured)", peak / 1e9)
        epochs = self.session.derived.total_tokens / self.reader.tokens_per_epoch
        log.info("the run reads its data %.2f times", epochs)
        self.metrics = Metrics(self.session, self.folder.path, peak=peak)
        self._write_status("running")


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
