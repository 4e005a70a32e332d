"""The exact log-probability of whole rows under given orders, differentiable, at any layout.

One pass over [true tokens; mask copies] returns every conditional (eso-lm section 5); a row's sum is
what the one-token-at-a-time sampler assigns to it. Policy-gradient training uses this log-probability.
Letters: B = rows, L = tokens of a row, b = rows of a micro-batch, N = entries.

Without a pipeline, :func:`sequence_log_probability` returns a tensor to differentiate. In a pipeline no
tensor reaches back over the stages, so :func:`accumulate_gradients` takes the loss as a function; it
works for every layout.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megatron_eso.config import derive
from megatron_eso.errors import ConfigError
from megatron_eso.model.replica import Replica
from megatron_eso.objective.rows import StackRows, filled_up, sequential_rows
from megatron_eso.parallel.exchange import rows_of_rank, sum_over_context
from megatron_eso.parallel.fp8_state import by_itself
from megatron_eso.parallel.schedule import run_micro_batches

LossOfRows = Callable[[Tensor, Tensor], Tensor]


def sequence_log_probability(
    replica: Replica, tokens: Tensor, orders: Tensor, is_valid: Tensor | None = None
) -> Tensor:
    """Return [B] log p(row | order) in nats, float64, the same on every tensor rank; differentiable.

    With sequence, context or data parallelism the gradients are complete after Megatron's
    ``finalize_model_grads``, as in training.

    Args:
        replica: the model at pipeline=1.
        tokens: [B, L] true tokens in reading order.
        orders: [B, L]; a permutation of the positions per row, padding last.
        is_valid: [B, L]; False for padding, which is not counted. None: no padding.

    Raises:
        ConfigError: with a pipeline.
    """
    if replica.layout.pipeline_size > 1:
        raise ConfigError(
            f"parallel.pipeline={replica.layout.pipeline_size}: a tensor to differentiate exists only at "
            "pipeline=1; use accumulate_gradients, which takes the loss as a function"
        )
    rows = _likelihood_rows(replica, tokens, orders, is_valid)
    with by_itself(replica.chunks):
        log_probs = replica.chunks[0](rows)
    return _sum_by_row(log_probs, rows, len(tokens), replica)


def accumulate_gradients(
    replica: Replica,
    tokens: Tensor,
    orders: Tensor,
    loss: LossOfRows,
    *,
    micro_batch_rows: int,
    is_valid: Tensor | None = None,
) -> Tensor:
    """Run forward and backward passes of a loss of the rows' log-probabilities, in any layout.

    Gradients are added to those the parameters hold: to ``main_grad`` of chunks wrapped for training, to
    ``grad`` of others. Those in ``main_grad`` are also reduced over ranks as in a training step, so make
    one call a step.

    Args:
        replica: the model; all its ranks must call with the same rows.
        tokens: [B, L] true tokens in reading order.
        orders: [B, L]; a permutation of the positions per row, padding last.
        loss: takes log-probabilities [b] and the rows' numbers [b]; returns a scalar. The gradient is that
            of the sum over micro-batches, so for a mean the caller must divide by a count of all rows.
        micro_batch_rows: rows that run at once (two stack rows each); must divide B.
        is_valid: [B, L]; False for padding. None: no padding.

    Returns:
        [B] log-probabilities in nats, float64, detached, the same on every rank of the replica.

    Raises:
        ConfigError: if ``micro_batch_rows`` does not divide B.
    """
    num_rows, length = tokens.shape
    if num_rows % micro_batch_rows:
        raise ConfigError(
            f"{num_rows} rows are not a multiple of micro_batch_rows={micro_batch_rows}"
        )
    parts = []
    for number in torch.arange(num_rows).split(micro_batch_rows):
        valid = None if is_valid is None else is_valid[number]
        parts.append((_likelihood_rows(replica, tokens[number], orders[number], valid), number))
    with by_itself(replica.chunks):
        reports = run_micro_batches(
            _step_of(replica, loss, micro_batch_rows),
            parts,
            replica.chunks,
            sequence_length=length,
            stack_rows=derive.fixed_stack_rows(replica.config) or 2 * micro_batch_rows,
        )
    found = torch.zeros(num_rows, dtype=torch.float64, device=replica.device)
    if replica.layout.is_last_stage:
        found = torch.cat([report["log_probs"] for report in reports])
    if replica.layout.pipeline_size > 1:
        torch.distributed.all_reduce(found, group=replica.layout.pipeline_group)
    return found


def _step_of(replica: Replica, loss: LossOfRows, num_rows: int) -> Any:
    """Return the forward step of Megatron's schedules."""

    def forward_step(batches: Iterator[tuple[StackRows, Tensor]], model: nn.Module) -> Any:
        rows, numbers = next(batches)

        def of_log_probs(log_probs: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            by_row = _sum_by_row(log_probs, rows, num_rows, replica)
            no_tokens = torch.zeros((), dtype=torch.int, device=by_row.device)
            return (
                loss(by_row, numbers.to(by_row.device)),
                no_tokens,
                {"log_probs": by_row.detach()},
            )

        return model(rows), of_log_probs

    return forward_step


def _likelihood_rows(
    replica: Replica, tokens: Tensor, orders: Tensor, is_valid: Tensor | None
) -> StackRows:
    """Return rows with every valid token to be predicted."""
    valid = torch.ones_like(tokens, dtype=torch.bool) if is_valid is None else is_valid
    mask_id = replica.config.model.vocab_size - 1
    rows = sequential_rows(tokens, valid, valid, orders, mask_id=mask_id)
    fixed, expected = derive.fixed_stack_rows(replica.config), replica.config.train.sequence_length
    if fixed is not None:
        if len(rows.tokens) > fixed or tokens.shape[1] != expected:
            raise ConfigError(
                f"{len(rows.tokens)} stack rows of {tokens.shape[1]} tokens do not fit the user buffers, "
                f"which hold {fixed} of {expected} (train.micro_batch_rows, train.sequence_length); take "
                "fewer rows at once, or set parallel.tensor_overlap=false"
            )
        rows = filled_up(rows, fixed)
    return rows_of_rank(rows, replica.layout, replica.device)


def _sum_by_row(log_probs: Tensor, rows: StackRows, num_rows: int, replica: Replica) -> Tensor:
    """Return [num_rows] sums of the log-probabilities [N] of all context ranks."""
    zeros = torch.zeros(num_rows, dtype=torch.float64, device=log_probs.device)
    own = zeros.index_add(0, rows.loss_rows, log_probs.double())
    return sum_over_context(own, replica.layout)
