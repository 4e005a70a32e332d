"""What a run reports as it trains, from rank 0: progress lines, metrics.jsonl and TensorBoard."""

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

from megatron_eso.eval.scores import Score
from megatron_eso.files import missing_newline
from megatron_eso.parallel.matmul_speed import matmul_flops_per_second
from megatron_eso.plan.flops import model_flops_per_step
from megatron_eso.plan.peaks import peak_of
from megatron_eso.train.session import Session
from megatron_eso.train.spare_output import Board, SpareOutput
from megatron_eso.train.step import StepReport

log = logging.getLogger(__name__)


class Metrics:
    """Collects step reports; writes every ``train.log_every_steps`` steps."""

    def __init__(self, session: Session, folder: Path, *, peak: float) -> None:
        """Open the files.

        Args:
            session: the run.
            folder: the run's folder.
            peak: FLOP/s of a large matmul on all ranks together.

        Raises:
            OSError: if a file cannot be opened.
        """
        config = session.config
        self._session, self._peak = session, peak
        flops = model_flops_per_step(
            config.model,
            config.objective,
            sequence_length=config.train.sequence_length,
            rows=config.train.global_batch_rows,
        )
        self._flops = flops.training
        self._hardware_flops = flops.hardware(config.parallel.recompute)
        self._gpu_peaks = _gpu_peaks(session)
        self._board = Board(folder / "tensorboard")
        self._board_output = SpareOutput("tensorboard")
        self._lines = open(folder / "metrics.jsonl", "a")
        self._lines_output = SpareOutput("metrics.jsonl")
        self._lines.write(missing_newline(folder / "metrics.jsonl"))
        self._since, self._steps, self._tokens = time.perf_counter(), 0, 0
        self._phases: dict[str, float] = {}

    def add(self, report: StepReport) -> bool:
        """Take in a step; write a line if one is due, and return whether it was."""
        self._steps += 1
        self._tokens += report.data_tokens
        for phase, seconds in report.seconds.items():
            self._phases[phase] = self._phases.get(phase, 0.0) + seconds
        config, total = self._session.config, self._session.derived.total_steps
        if report.step % config.train.log_every_steps and report.step not in (1, total):
            return False
        elapsed = time.perf_counter() - self._since
        values = self._values(report, elapsed / self._steps)
        self._write(report.step, values)
        log.info(_line(report, values, total, elapsed / self._steps))
        self._since, self._steps, self._tokens = time.perf_counter(), 0, 0
        self._phases = {}
        return True

    def pause(self, begin: float) -> None:
        """Exclude the time since ``begin`` (an evaluation or a save) from the reported speed."""
        self._since += time.perf_counter() - begin

    def add_scores(self, step: int, name: str, scores: list[Score]) -> None:
        """Write validation scores."""
        for score in scores:
            log.info(
                "step %d  %s %s: %.4f +- %s nats per token, perplexity %.2f, %.3f bits per byte",
                step, name, score.metric, score.nats_per_token, score.shown_error(),
                score.perplexity, score.bits_per_byte,
            )  # fmt: skip
            entry = {"step": step, "validation": name, **score.as_dict()}
            self._lines_output.attempt(lambda entry=entry: self._write_line(entry))
            tag = f"validation/{name}/{score.metric}"
            on_board = {
                f"{tag}/nats_per_token": score.nats_per_token,
                f"{tag}/perplexity": score.perplexity,
            }
            self._add_to_board(on_board, step)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Write one number to TensorBoard."""
        self._add_to_board({tag: value}, step)

    def close(self) -> None:
        """Write out what is buffered."""
        self._board_output.attempt(self._board.close)
        self._lines_output.attempt(self._lines.close)

    def _add_to_board(self, values: dict[str, float], step: int) -> None:
        self._board_output.attempt(lambda: self._board.add(values, step))

    def _write_line(self, entry: dict[str, Any]) -> None:
        self._lines.write(json.dumps(entry) + "\n")
        self._lines.flush()

    def _values(self, report: StepReport, seconds_per_step: float) -> dict[str, Any]:
        phases = {f"seconds_{k}": v / self._steps for k, v in self._phases.items()}
        train = self._session.config.train
        return {
            "step": report.step,
            # Places of all rows so far; the speed leaves out padding, of which steps have more or less.
            "tokens": report.step * train.global_batch_rows * train.sequence_length,
            "loss": report.loss,
            "loss_diffusion": report.loss_diffusion,
            "loss_sequential": report.loss_sequential,
            "learning_rate": report.learning_rate,
            "grad_norm": report.grad_norm,
            "seconds_per_step": seconds_per_step,
            "tokens_per_second": self._tokens / self._steps / seconds_per_step,
            "model_flops_per_second": self._flops / seconds_per_step,
            "share_of_matmul_peak": self._flops / seconds_per_step / self._peak,
            **self._utilisation(seconds_per_step),
            "share_waiting_for_data": phases["seconds_data"] / seconds_per_step,
            "memory_gib": self._session.device.memory_gib(),
            **phases,
        }

    def _utilisation(self, seconds_per_step: float) -> dict[str, float]:
        """Return MFU and HFU: the model's FLOPs, and all FLOPs that ran, over each known GPU peak."""
        found = {}
        for name, peak in self._gpu_peaks.items():
            found[f"mfu{name}"] = self._flops / seconds_per_step / peak
            found[f"hfu{name}"] = self._hardware_flops / seconds_per_step / peak
        return found

    def _write(self, step: int, values: dict[str, Any]) -> None:
        kept = {k: v for k, v in values.items() if not (isinstance(v, float) and math.isnan(v))}
        self._lines_output.attempt(lambda: self._write_line(kept))
        on_board = {}
        for name, value in kept.items():
            if name != "step":
                is_time = name.startswith("seconds") or name == "share_waiting_for_data"
                on_board[f"{'time' if is_time else 'train'}/{name}"] = value
        self._add_to_board(on_board, step)


def measured_peak(session: Session) -> float:
    """Return the total FLOP/s of large matmuls run on all ranks together. All ranks must call this."""
    from megatron_eso.model.megatron_config import DTYPES
    from megatron_eso.parallel.exchange import sum_over_ranks

    dtype = DTYPES[session.config.precision.dtype]
    mine = matmul_flops_per_second(dtype, session.torch_device)
    return sum_over_ranks([mine], session.torch_device)[0]


def _gpu_peaks(session: Session) -> dict[str, float]:
    """Return the summed peaks of all ranks' GPUs: BF16, and FP8 where it is used; empty on CPUs."""
    name = session.device.gpu_name()
    peak = peak_of(name)
    if peak is None:
        if name:
            log.info("the peak of %s is not known (plan/peaks.py): no MFU", name)
        return {}
    number, uses_fp8 = session.ranks.world_size, session.config.precision.fp8 != "off"
    peaks = {"": peak.bf16 * number}
    return {**peaks, "_fp8": peak.fp8 * number} if uses_fp8 and peak.fp8 else peaks


def _share(values: dict[str, Any]) -> str:
    """Return how near the run is to peak: a known GPU's, else that of measured matmuls."""
    if "mfu" not in values:
        return f"{values['share_of_matmul_peak']:.0%} of matmul"
    text = f"MFU {values['mfu']:.1%}, HFU {values['hfu']:.1%}"
    return text if "mfu_fp8" not in values else f"{text}; of FP8's peak {values['mfu_fp8']:.1%}"


def _line(report: StepReport, values: dict[str, Any], total: int, seconds: float) -> str:
    parts = []
    if not math.isnan(report.loss_diffusion):
        parts.append(f"diffusion {report.loss_diffusion:.3f}")
    if not math.isnan(report.loss_sequential):
        parts.append(f"sequential {report.loss_sequential:.3f}")
    left = int((total - report.step) * seconds)
    return (
        f"step {report.step}/{total}  loss {report.loss:.4f} ({', '.join(parts)})  "
        f"{values['tokens_per_second']:,.0f} tokens/s  "
        f"{values['model_flops_per_second'] / 1e9:,.1f} GFLOP/s "
        f"({_share(values)})  "
        f"{values['memory_gib']:.1f} GiB  lr {report.learning_rate:.2e}  "
        f"norm {report.grad_norm:.2f}  {left // 60}:{left % 60:02d} left"
    )
