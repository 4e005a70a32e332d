"""Log-probabilities of the whole vocabulary, through any layout: for checks, not for training.

Training and scoring never form them (vocabulary_loss.py). Letters: N = entries, V = real tokens.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megatron_eso.model.replica import Replica
from megatron_eso.objective.rows import StackRows, to_device
from megatron_eso.parallel.schedule import run_micro_batches
from megatron_eso.sample.stages import gather_vocabulary


def full_log_probs(replica: Replica, rows: StackRows) -> Tensor | None:
    """Return [N, V] log-probabilities of every real token at ``rows.loss_entries``.

    Args:
        replica: the model, at virtual_pipeline=1 and context=1. All its ranks must call.
        rows: one micro-batch.

    Returns:
        float32 or float64 on the ranks of the last pipeline stage; None on the others.
    """
    num_real = replica.config.model.vocab_size - 1

    def forward_step(batches: Iterator[StackRows], model: nn.Module) -> Any:
        stack: Any = next(batches)
        part: Any = model
        described = part.attention_rows(
            stack.positions,
            num_pairs=stack.num_pairs,
            pattern=stack.pattern,
            block_size=stack.block_size,
            is_valid=stack.is_valid,
        )
        hidden = part.hidden_states(stack.tokens, described)
        if part.post_process:
            local = part.logits(hidden, stack.loss_entries)
            hidden = gather_vocabulary(local, replica.layout.tensor_group)[:, :num_real]

        def report(logits: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            found = {"log_probs": torch.log_softmax(logits, dim=1)}
            return logits.sum(), torch.zeros((), dtype=torch.int), found

        return hidden, report

    with torch.no_grad():
        reports = run_micro_batches(
            forward_step,
            [to_device(rows, replica.device)],
            replica.chunks,
            sequence_length=rows.tokens.shape[1],
            stack_rows=len(rows.tokens),
            forward_only=True,
        )
    return reports[0]["log_probs"] if replica.layout.is_last_stage else None
