"""One forward pass of a sampler through all pipeline stages: hidden states on, logits back to all.

Letters: B = rows, n = entries of the segment, H = hidden size, V = vocabulary without the mask token.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_eso.model.eso_model import EsoModel
from megatron_eso.model.replica import Replica
from megatron_eso.parallel.exchange import last_stage_tensor, receive_hidden, send_hidden


def stage_logits(
    replica: Replica, inputs: Tensor, positions: Tensor, entries: Tensor, **rows: Any
) -> Tensor:
    """Return [B, k, V] logits, the same on every rank of the replica.

    Args:
        replica: model with one chunk per stage and without sequence parallelism.
        inputs: [B, n] token ids.
        positions: [B, n] rotary positions.
        entries: [B, k] slots of the segment that reach the head.
        rows: further fields of AttentionRows.
    """
    hidden = stage_hidden(replica, inputs, positions, **rows)
    model: EsoModel = replica.chunks[0]  # type: ignore[assignment]
    num_real = replica.config.model.vocab_size - 1
    shape = (*entries.shape, num_real)
    logits = None
    if hidden is not None:
        first = torch.arange(inputs.shape[0], device=entries.device)[:, None] * inputs.shape[1]
        flat = model.logits(hidden, (first + entries).reshape(-1))
        logits = gather_vocabulary(flat, model.decoder.tp_group)[:, :num_real].view(shape)
    return last_stage_tensor(logits, replica.layout, shape, _dtype(model), replica.device)


def stage_hidden(replica: Replica, inputs: Tensor, positions: Tensor, **rows: Any) -> Tensor | None:
    """Run the segment through all stages; return [n, B, H] on the last one, None on the others."""
    model: EsoModel = replica.chunks[0]  # type: ignore[assignment]
    layout = replica.layout
    if not layout.is_first_stage:
        shape = (inputs.shape[1], inputs.shape[0], model.config.hidden_size)
        model.set_input_tensor([receive_hidden(layout, shape, _dtype(model), replica.device)])
    hidden = model.hidden_states(inputs, model.attention_rows(positions, **rows))
    if layout.is_last_stage:
        return hidden
    send_hidden(layout, hidden)
    return None


def gather_vocabulary(logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return [N, V] from every tensor rank's [N, V/T] columns."""
    if group.size() == 1:
        return logits
    parts = [torch.empty_like(logits) for _ in range(group.size())]
    dist.all_gather(parts, logits.contiguous(), group=group)
    return torch.cat(parts, dim=1)


def _dtype(model: EsoModel) -> torch.dtype:
    return next(model.parameters()).dtype
