"""One optimizer step: this rank's rows -> stack rows -> model -> sums -> gradients -> update.

The loss stands beside the model call in ``forward_step``; everything above it is bookkeeping.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn

from megatron_eso.config.schema import ObjectiveConfig
from megatron_eso.objective.build import Draw, build_rows
from megatron_eso.objective.deal import MicroBatch, deal
from megatron_eso.objective.losses import TokenCounts, loss_sums, mean_loss, with_loss_gradient
from megatron_eso.objective.rows import StackRows
from megatron_eso.parallel.exchange import (
    Rows,
    any_rank,
    read_together,
    rows_of_rank,
    sum_over_ranks,
)
from megatron_eso.parallel.fp8_state import kept_scales
from megatron_eso.parallel.groups import seed_dropout
from megatron_eso.parallel.optimizer import apply_gradients, gradient_norm
from megatron_eso.parallel.phases import phase
from megatron_eso.parallel.schedule import run_micro_batches
from megatron_eso.train.learning_rate import learning_rate
from megatron_eso.train.session import Session

ReadRows = Callable[[int, list[int]], Rows]
"""Returns the data rows of a step by their numbers in the global batch."""


class Quality(IntEnum):
    """How good a step looks. The worst judgment of any rank counts."""

    GOOD = 0
    SPIKE = 1
    NOT_FINITE = 2


Judge = Callable[[float, float], Quality]
"""Judges a step by its loss and gradient norm; only good ones are applied."""


def finite_is_good(loss: float, norm: float) -> Quality:
    """Return GOOD if loss and gradient norm are finite, else NOT_FINITE."""
    return Quality.GOOD if math.isfinite(loss) and math.isfinite(norm) else Quality.NOT_FINITE


@dataclass(frozen=True)
class StepReport:
    """What one step did; the same on every rank."""

    step: int
    quality: Quality
    """Unless good, nothing was applied: the weights and the state stayed as they were."""
    loss: float
    loss_diffusion: float
    """Weighted diffusion nats per token of the diffusion rows; nan if there are none."""
    loss_sequential: float
    """Sequential nats per token of the sequential rows; nan if there are none."""
    grad_norm: float
    learning_rate: float
    data_tokens: int
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock seconds by phase."""

    @property
    def is_applied(self) -> bool:
        """True if the weights were updated."""
        return self.quality is Quality.GOOD


def micro_batches_of_rank(session: Session) -> list[MicroBatch]:
    """Return which rows of the global batch this data-parallel rank computes, per micro-batch."""
    derived = session.derived
    diffusion, sequential = derived.num_diffusion_rows, derived.num_sequential_rows
    return deal(
        num_diffusion_rows=diffusion,
        num_sequential_rows=sequential,
        micro_batch_rows=session.config.train.micro_batch_rows,
        rank=session.layout.data_rank,
        num_ranks=session.layout.data_size,
    )


def train_step(session: Session, read: ReadRows, judge: Judge = finite_is_good) -> StepReport:
    """Run the next step. Weights and state change only if no rank finds it bad."""
    config, step = session.config, session.state.step
    begin = time.perf_counter()
    if config.model.dropout > 0:
        seed_dropout(config.train.seed, step, session.layout)
    micro_batches = micro_batches_of_rank(session)
    numbers = [row for micro_batch in micro_batches for row in micro_batch.rows]
    with phase("data"):
        rows = read_together(
            lambda: read(step, numbers),
            session.layout,
            session.torch_device,
            shape=(len(numbers), config.train.sequence_length + 1),
        )
    read_done = time.perf_counter()
    with phase("rows"):
        stack = stack_rows_of_step(session, rows, micro_batches)
        counts = global_counts(stack, session)
    rows_done = time.perf_counter()
    undo_scales = kept_scales(session.chunks)
    session.clock.start()
    sums = forward_backward(session, stack, counts)
    passes_done = time.perf_counter()
    diffusion = sums[0] / counts.diffusion if counts.diffusion else float("nan")
    sequential = sums[1] / counts.sequential if counts.sequential else float("nan")
    loss = sum(x for x, n in ((diffusion, counts.diffusion), (sequential, counts.sequential)) if n)
    rate = learning_rate(step, config.optimizer, session.derived.total_steps)
    with phase("optimizer"):
        norm = gradient_norm(session.optimizer)
        mine = judge(loss, norm)
        worse = any_rank([mine >= limit for limit in (1, 2)], session.torch_device)
        quality = Quality(sum(worse))
        if quality is Quality.GOOD:
            _apply(session, rate, norm)
        else:
            undo_scales()
    end = time.perf_counter()
    return StepReport(
        step=step + 1,
        quality=quality,
        loss=loss,
        loss_diffusion=diffusion,
        loss_sequential=sequential,
        grad_norm=norm,
        learning_rate=rate,
        data_tokens=counts.diffusion + counts.sequential,
        seconds={
            "data": read_done - begin,
            "rows": rows_done - read_done,
            "forward_backward": passes_done - rows_done,
            "own_passes": session.clock.seconds(),
            "optimizer": end - passes_done,
        },
    )


def _apply(session: Session, rate: float, norm: float) -> None:
    limit = session.config.optimizer.clip_grad_norm
    apply_gradients(session.optimizer, learning_rate=rate, max_norm=limit, norm=norm)
    session.state.step += 1
    if session.average is not None:
        session.average.update(session.state.num_updates)


def stack_rows_of_step(
    session: Session, rows: Rows, micro_batches: list[MicroBatch]
) -> list[StackRows]:
    """Return this rank's part of its micro-batches' stack rows, on its device."""
    config = session.config
    draw = Draw(config.train.seed, session.state.step, num_time_strata(session))
    built, first = [], 0
    for micro_batch in micro_batches:
        end = first + len(micro_batch.rows)
        stack = build_rows(
            rows.tokens[first:end],
            rows.is_valid[first:end],
            micro_batch,
            config.objective,
            draw,
            mask_id=config.model.vocab_size - 1,
        )
        built.append(rows_of_rank(stack, session.layout, session.torch_device))
        first = end
    return built


def num_time_strata(session: Session) -> int:
    """Return how many rows of the global batch draw a diffusion time."""
    derived, objective = session.derived, session.config.objective
    return derived.num_sequential_rows if _is_block(objective) else derived.num_diffusion_rows


def forward_backward(
    session: Session, stack: list[StackRows], counts: TokenCounts
) -> tuple[float, float]:
    """Run forward and backward passes; return the global [diffusion, sequential] nats."""

    def forward_step(micro_batches: Iterator[StackRows], model: nn.Module) -> Any:
        rows = next(micro_batches)
        with phase("forward"):
            log_probs = model(rows)

        def loss(log_probs: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            sums = loss_sums(log_probs, rows)
            no_tokens = torch.zeros((), dtype=torch.int, device=sums.device)
            return mean_loss(sums, counts), no_tokens, {"sums": sums.detach()}

        return log_probs, loss

    for chunk in session.chunks:
        chunk.zero_grad_buffer()  # type: ignore[operator]
    session.optimizer.zero_grad()
    with phase("backward"):  # includes what the schedule does between passes
        reports = run_micro_batches(
            forward_step,
            [with_loss_gradient(rows, counts) for rows in stack],
            session.chunks,
            sequence_length=session.config.train.sequence_length,
            stack_rows=session.config.train.micro_batch_rows,
        )
    local = [0.0, 0.0]
    if session.layout.reports_losses:
        local = torch.stack([report["sums"] for report in reports]).double().sum(dim=0).tolist()
    diffusion, sequential = sum_over_ranks(local, session.torch_device)
    return diffusion, sequential


def global_counts(stack: list[StackRows], session: Session) -> TokenCounts:
    """Return the valid tokens of the global batch, summed over the ranks that have them."""
    local = [0.0, 0.0]
    if session.layout.reports_losses:
        local = [
            float(sum(rows.num_diffusion_tokens for rows in stack)),
            float(sum(rows.num_sequential_tokens for rows in stack)),
        ]
    diffusion, sequential = sum_over_ranks(local, session.torch_device)
    return TokenCounts(round(diffusion), round(sequential))


def _is_block(objective: ObjectiveConfig) -> bool:
    return objective.name == "bd3lm"
