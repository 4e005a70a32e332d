"""The training loop: step, log, evaluate, save, stop, in plain lines."""

import logging
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_eso.checkpoint.folder import FORMAT_VERSION, CheckpointFolder, list_folders
from megatron_eso.checkpoint.load import (
    find_checkpoint,
    load_training_state,
    load_weights,
    newest_valid,
    require_same_model,
)
from megatron_eso.checkpoint.save import Saver
from megatron_eso.checkpoint.state import collect
from megatron_eso.config.schema import RunConfig
from megatron_eso.data.reader import RowReader, ValidationReader
from megatron_eso.errors import CheckpointError, ConfigError, TrainingError
from megatron_eso.eval.evaluate import evaluate
from megatron_eso.eval.scores import Score
from megatron_eso.eval.unigram import unigram_score
from megatron_eso.parallel.device import Ranks
from megatron_eso.parallel.exchange import Rows, any_rank, raise_together
from megatron_eso.resilience.signals import StopRequest
from megatron_eso.train.metrics import Metrics, measured_peak
from megatron_eso.train.run_folder import RunFolder
from megatron_eso.train.session import build_session
from megatron_eso.train.step import train_step

log = logging.getLogger(__name__)
_UNIGRAM_ROWS = 2048  # training rows that the unigram comparison counts
STOPPED_EXIT_CODE = 75  # EX_TEMPFAIL: run the same command again


class Run:
    """A run in progress on this rank."""

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        self.stop = StopRequest()
        self.stop.install()
        self.session = session = build_session(config, ranks)
        self.folder = RunFolder(Path(config.folder))
        self._create_folder()
        self.reader = RowReader(
            config.data,
            sequence_length=config.train.sequence_length,
            vocab_size=config.model.vocab_size,
            global_batch_rows=config.train.global_batch_rows,
            seed=config.train.seed,
        )
        self.validation = {
            name: ValidationReader(
                Path(path),
                sequence_length=config.train.sequence_length,
                vocab_size=config.model.vocab_size,
            )
            for name, path in config.data.validation.items()
        }
        self.saver = Saver(self.folder.checkpoints, config.checkpoint)
        self._resume()
        if not self._has_room(session.state.step):
            raise CheckpointError(
                f"{self.folder.path} has no room for one checkpoint: free space or choose another folder"
            )
        self.metrics = None
        peak = measured_peak(session)
        if self.is_first:
            self._describe(peak)
            self.metrics = Metrics(session, self.folder.path, peak=peak)

    @property
    def is_first(self) -> bool:
        """True on the rank that writes."""
        return self.session.ranks.rank == 0

    def train(self) -> int:
        """Train to the end or until asked to stop; return the exit code."""
        session, config = self.session, self.session.config
        total = session.derived.total_steps
        while session.state.step < total:
            report = train_step(session, self._read)
            if not report.is_finite:
                self._give_up(report.step, report.loss, report.grad_norm)
            self.saver.poll()
            step = session.state.step
            if self.metrics is not None and self.metrics.add(report):
                self._write_status("running", loss=report.loss)
            if _is_due(step, config.train.eval_every_steps) and step < total:
                self._evaluate()
            if any_rank([self.stop.is_set], session.torch_device)[0]:
                return self._stop_early()
            if _is_due(step, config.train.save_every_steps) and step < total:
                self._save()
        if not self._save():
            raise CheckpointError(
                f"no room under {self.folder.path} for the last checkpoint: free space and run the same "
                "command, which continues from the checkpoint before"
            )
        scores = self._evaluate()
        self.saver.finish()
        if self.metrics is not None:
            for name, score in self._unigram().items():
                self.metrics.add_scores(session.state.step, name, [score])
                scores[name].append(score.as_dict())
            self.metrics.close()
            self.folder.write_json("evaluation.json", scores)
            self._write_status("finished")
            log.info("finished; everything is in %s", self.folder.path)
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

    def _resume(self) -> None:
        session, settings = self.session, self.session.config.checkpoint
        found: list[str] = [""]
        if self.is_first:
            folder = newest_valid(self.folder.checkpoints, hashes=settings.verify_hashes)
            found = [str(folder.path) if folder else ""]
        dist.broadcast_object_list(found, src=0)
        if found[0]:
            folder = CheckpointFolder(Path(found[0]))
            self._require_same_data(folder)
            session.state.step = load_training_state(
                folder,
                session.chunks,
                session.optimizer,
                session.average,
                device=session.torch_device,
            )
            if self.is_first:
                log.info("continuing from %s", folder.path)
        elif settings.init_from:
            folder = find_checkpoint(Path(settings.init_from), hashes=settings.verify_hashes)
            require_same_model(folder, asdict(session.config.model))
            kind = load_weights(folder, session.chunks, use_ema=True, device=session.torch_device)
            session.optimizer.reload_model_params()
            log.info("weights (%s) from %s", kind, folder.path)

    def _require_same_data(self, folder: CheckpointFolder) -> None:
        require_same_model(folder, asdict(self.session.config.model))
        stored, mine = folder.sidecar()["data"], self.reader.fingerprint()
        changed = [name for name, value in mine.items() if stored.get(name) != value]
        if changed:
            raise CheckpointError(
                f"{folder.path} was trained on other data ({', '.join(changed)} differ): continuing "
                "would repeat or skip samples; restore data.sources or choose another folder"
            )

    def _save(self) -> bool:
        """Start writing a checkpoint; return False if there is no room for it."""
        session, begin = self.session, time.perf_counter()
        step = session.state.step
        self.saver.finish()  # the room that a save under way will take is then counted
        if not self._has_room(step):
            return False
        state = collect(
            session.chunks, session.optimizer, session.average, session.layout.data_group
        )
        self.saver.save(step, state, self._sidecar())
        stall = time.perf_counter() - begin
        if self.metrics is not None:
            log.info("checkpoint of step %d: training stalled for %.2f s", step, stall)
            self.metrics.add_scalar("time/checkpoint_stall_seconds", stall, step)
            self.metrics.pause(begin)
        return True

    def _has_room(self, step: int) -> bool:
        """Return whether the disk holds one more checkpoint; all ranks agree."""
        number = sum(p.numel() for chunk in self.session.chunks for p in chunk.parameters())
        layout = self.session.layout
        needed = number * 16 * layout.tensor_size * layout.pipeline_size
        is_full = False
        if self.is_first:
            free = shutil.disk_usage(self.folder.path).free
            is_full = free < needed * 1.1
            if is_full:
                log.warning(
                    "no room for a checkpoint of step %d: %.2f GiB needed, %.2f GiB free under %s; "
                    "training goes on, older checkpoints stay", step, needed / 2**30, free / 2**30,
                    self.folder.path,
                )  # fmt: skip
        return not any_rank([is_full], self.session.torch_device)[0]

    def _sidecar(self) -> dict:
        session = self.session
        return {
            "format_version": FORMAT_VERSION,
            "step": session.state.step,
            "has_ema": session.average is not None,
            "model": asdict(session.config.model),
            "objective": asdict(session.config.objective),
            "sequence_length": session.config.train.sequence_length,
            "mask_token_id": session.config.model.vocab_size - 1,
            "data": self.reader.fingerprint(),
            "tokenizer": str(Path(session.config.data.sources[0].path).parent / "tokenizer.json"),
            "parallel": asdict(session.config.parallel),
        }

    def _evaluate(self) -> dict:
        """Score every validation set; return the scores by set."""
        session, begin, results = self.session, time.perf_counter(), {}
        for name, reader in self.validation.items():
            if session.average is not None and session.config.eval.use_ema:
                with session.average.applied(session.chunks):
                    scores = self._score(reader)
            else:
                scores = self._score(reader)
            results[name] = [score.as_dict() for score in scores]
            if self.metrics is not None:
                self.metrics.add_scores(session.state.step, name, scores)
        if self.metrics is not None:
            self.metrics.pause(begin)
        return results

    def _unigram(self) -> dict[str, Score]:
        """Score the validation sets with token frequencies of (some of) the training data."""
        config = self.session.config
        per_step = list(range(config.train.global_batch_rows))
        steps = range(-(-_UNIGRAM_ROWS // len(per_step)))
        train = torch.from_numpy(np.stack([self.reader.read(s, per_step).tokens for s in steps]))
        scores = {}
        for name, reader in self.validation.items():
            rows = list(range(min(config.eval.num_rows, reader.num_rows)))
            scores[name] = unigram_score(
                train,
                torch.from_numpy(reader.read(rows).tokens)[:, :-1],
                vocab_size=config.model.vocab_size,
                bytes_per_token=reader.bytes_per_token,
            )
        return scores

    def _score(self, reader: ValidationReader) -> list[Score]:
        def read(rows: list[int]) -> Rows:
            got = reader.read(rows)
            return Rows(torch.from_numpy(got.tokens), torch.from_numpy(got.is_valid))

        return evaluate(
            self.session.replica,
            read,
            num_rows=min(self.session.config.eval.num_rows, reader.num_rows),
            bytes_per_token=reader.bytes_per_token,
        )

    def _stop_early(self) -> int:
        self._save()
        self.saver.finish()
        if self.is_first:
            log.info(
                "stopped by %s at step %d with a checkpoint; the same command continues",
                self.stop.name or "a signal to another rank", self.session.state.step,
            )  # fmt: skip
            self._write_status("stopped", reason=self.stop.name)
        return STOPPED_EXIT_CODE

    def _give_up(self, step: int, loss: float, norm: float) -> None:
        self._save()
        self.saver.finish()
        message = (
            f"step {step}: loss {loss} and gradient norm {norm} are not finite; the update was not "
            f"applied and step {self.session.state.step} is saved. Lower optimizer.learning_rate="
            f"{self.session.config.optimizer.learning_rate:g}, use a longer optimizer.warmup_steps or "
            "precision.dtype=fp32"
        )
        if self.is_first:
            self._write_status("failed", reason=message)
        raise TrainingError(message)

    def _write_status(self, state: str, **facts: object) -> None:
        self.folder.write_status(
            state,
            step=self.session.state.step,
            total_steps=self.session.derived.total_steps,
            **facts,
        )

    def _describe(self, peak: float) -> None:
        config = self.session.config
        for line in self.session.derived.lines():
            log.info(line)
        log.info(
            "precision.dtype = %s, device %s", config.precision.dtype, self.session.torch_device
        )
        log.info("matmul peak of all ranks: %.1f GFLOP/s (measured)", peak / 1e9)
        epochs = self.session.derived.total_tokens / self.reader.tokens_per_epoch
        log.info("the run reads its data %.2f times", epochs)


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
