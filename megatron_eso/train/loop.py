"""The training loop: step, log, evaluate, save, stop, in plain lines."""

import logging
import os
import time
from pathlib import Path

import torch

from megatron_eso.checkpoint.folder import list_folders
from megatron_eso.config.schema import RunConfig
from megatron_eso.data.reader import RowReader
from megatron_eso.errors import STOPPED_EXIT_CODE, CheckpointError, ConfigError, TrainingError
from megatron_eso.launch import events
from megatron_eso.launch.heartbeat import Heart
from megatron_eso.parallel.device import Ranks
from megatron_eso.parallel.exchange import Rows, any_rank, raise_together, together
from megatron_eso.parallel.phases import phase
from megatron_eso.resilience.signals import StopRequest
from megatron_eso.train.guard import StepGuard
from megatron_eso.train.keeper import Keeper
from megatron_eso.train.metrics import Metrics, measured_peak
from megatron_eso.train.profile import Profile
from megatron_eso.train.run_folder import RunFolder
from megatron_eso.train.session import build_session, choices
from megatron_eso.train.stragglers import Stragglers
from megatron_eso.train.validation import StopAskedError, Validation

log = logging.getLogger(__name__)
_PROGRESS_SECONDS = 10.0  # between notes in the ledger of how far the run is


class Run:
    """A run in progress on this rank."""

    def __init__(self, config: RunConfig, ranks: Ranks, stop: StopRequest | None = None) -> None:
        """Set everything up and load the newest checkpoint; all ranks must call.

        Args:
            config: the run.
            ranks: this process's place.
            stop: catches signals already; None: begin to.
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
        self.session = session = build_session(config, ranks, draw_weights=False)
        self.folder = RunFolder(Path(config.folder))
        self._create_folder()
        self._note("setup", began=begin, joined=session.joined)
        # One rank whose store, cache or disk fails must not leave the others waiting for it.
        self.reader = together(lambda: _open_rows(config), session.torch_device)
        together(self._keep_tokenizer, session.torch_device)
        self.validation = together(lambda: Validation(config), session.torch_device)
        self.keeper = Keeper(session, self.folder, self.reader, self.heart)
        self.keeper.resume_or_start()
        self.guard = StepGuard(session, self._read, self.keeper.go_back, self.folder.path)
        self.stragglers = Stragglers(config.resilience.straggler_every_steps)
        self.profile = Profile(config.train, self.folder.path, ranks.rank)
        self.metrics = None
        peak = measured_peak(session)
        if self.is_first:
            self._describe(peak)
            self.metrics = Metrics(session, self.folder.path, peak=peak)
        self._noted = time.monotonic()
        self._note("ready", step=session.state.step)

    @property
    def is_first(self) -> bool:
        """True on the rank that writes."""
        return self.session.ranks.rank == 0

    def train(self) -> int:
        """Train to the end or until asked to stop; return the exit code."""
        session, config = self.session, self.session.config
        total = session.derived.total_steps
        if self._must_stop():
            return self._stop_early()
        while session.state.step < total:
            with self.profile.step(session.state.step + 1):
                self.heart.enter("step")
                self._step()
                step = session.state.step
                try:
                    if _is_due(step, config.train.eval_every_steps) and step < total:
                        self._evaluate()
                except StopAskedError:
                    return self._stop_early()
                if self._must_stop():
                    return self._stop_early()
                if _is_due(step, config.train.save_every_steps) and step < total:
                    self._save()
                    if self._must_stop():  # it came during the save: this checkpoint is the last
                        return self._stop_early()
                self.keeper.copy_locally()
        return self._finish()

    def _step(self) -> None:
        try:
            report = self.guard.step()
        except TrainingError as error:
            self._give_up(str(error))
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
        """Return whether a signal came to any rank; the save under way goes on with the same exchange."""
        saver = self.keeper.saver
        stop, *saving = any_rank([self.stop.is_set, *saver.flags()], self.session.torch_device)
        saver.advance(*saving)
        self.heart.kept_step = self.keeper.kept_step
        return stop

    def _between_evaluations(self) -> None:
        self.heart.beat()
        if self._must_stop():
            raise StopAskedError

    def _finish(self) -> int:
        self._save()
        if not self.keeper.finish():
            raise CheckpointError(
                f"the last checkpoint could not be written under {self.folder.path}: free space there and "
                "run the same command, which continues from the checkpoint before"
            )
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
            self.folder.write_json("evaluation.json", scores)
            self._write_status("finished")
            log.info("finished; everything is in %s", self.folder.path)
        self._end("finished")
        self.reader.close()
        return 0

    def _read(self, step: int, rows: list[int]) -> Rows:
        read = self.reader.read(step, rows)
        return Rows(torch.from_numpy(read.tokens), torch.from_numpy(read.is_valid))

    def _create_folder(self) -> None:
        failure = ""
        if self.is_first:
            try:
                self.folder.create(self.session.config)
                if self.session.config.checkpoint.resume == "never" and list_folders(
                    self.folder.checkpoints
                ):
                    failure = (
                        f"{self.folder.checkpoints} holds checkpoints and checkpoint.resume=never; "
                        "choose another folder or checkpoint.resume=auto"
                    )
                self.folder.open_log()
            except ConfigError as error:
                failure = str(error)
        raise_together(failure, ConfigError, self.session.torch_device)

    def _keep_tokenizer(self) -> None:
        """Put the data's tokenizer beside the checkpoints."""
        if self.is_first:
            self.folder.tokenizer.write_bytes(self.reader.tokenizer_json())

    def _save(self) -> None:
        begin = time.perf_counter()
        with phase("checkpoint"):
            stall = self.keeper.save()
        if self.metrics is not None and stall is not None:
            step = self.session.state.step
            self.metrics.add_scalar("time/checkpoint_stall_seconds", stall, step)
            self.metrics.pause(begin)

    def _evaluate(self) -> dict:
        """Score every validation set; return the scores by set."""
        begin = time.perf_counter()
        self.heart.enter("evaluation")
        with phase("evaluation"):
            found = self.validation.scores(self.session, self._between_evaluations)
        if self.metrics is not None:
            for name, scores in found.items():
                self.metrics.add_scores(self.session.state.step, name, scores)
            self.metrics.pause(begin)
        self._note("evaluation", seconds=time.perf_counter() - begin)
        return {name: [score.as_dict() for score in scores] for name, scores in found.items()}

    def _stop_early(self) -> int:
        self._save()
        is_kept = self.keeper.finish()
        if self.is_first:
            log.info(
                "stopped by %s at step %d %s, %.1f s after the signal; the same command continues",
                self.stop.name or "a signal to another rank", self.session.state.step,
                "with a checkpoint" if is_kept else "WITHOUT a checkpoint of this step",
                self.stop.seconds_ago,
            )  # fmt: skip
            self._write_status("stopped", reason=self.stop.name)
        self._end("stopped", reason=self.stop.name, seconds=round(self.stop.seconds_ago, 3))
        return STOPPED_EXIT_CODE

    def _give_up(self, why: str) -> None:
        """Save what is good after a step that is not, and say why the run ends."""
        self._save()
        self.keeper.finish()
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
        try:
            self.folder.write_status(state, step=step, total_steps=total, **facts)
        except OSError as error:
            log.warning("status.json cannot be written: %s", error)

    def _describe(self, peak: float) -> None:
        for line in [*self.session.derived.lines(), *choices(self.session)]:
            log.info(line)
        log.info("matmul peak of all ranks: %.1f GFLOP/s (measured)", peak / 1e9)
        epochs = self.session.derived.total_tokens / self.reader.tokens_per_epoch
        log.info("the run reads its data %.2f times", epochs)


def _open_rows(config: RunConfig) -> RowReader:
    return RowReader(
        config.data,
        sequence_length=config.train.sequence_length,
        vocab_size=config.model.vocab_size,
        global_batch_rows=config.train.global_batch_rows,
        seed=config.train.seed,
    )


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
