"""One forward pass of a sampler through all pipeline stages: hidden states on, logits back to all.

Letters: B = rows, n = entries of the segment, H = hidden size, V = vocabulary without the mask token.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_eso.model.eso_model import EsoModel
from megatron_eso.model.replica import Replica
from megatron_eso.model.segment import SegmentPass, can_run
from megatron_eso.parallel.exchange import last_stage_tensor, receive_hidden, send_hidden


class Stages:
    """The forward pass of a sampler through all pipeline stages."""

    def __init__(self, replica: Replica) -> None:
        """Prepare this rank's stage: one chunk, without sequence parallelism."""
        self._model: EsoModel = replica.chunks[0]  # type: ignore[assignment]
        self._replica = replica
        self._dtype = next(self._model.parameters()).dtype
        # Layers of other parts (Transformer Engine's) run as Megatron runs them.
        self._lean = SegmentPass(self._model) if can_run(self._model) else None

    def logits(self, inputs: Tensor, positions: Tensor, entries: Tensor, **rows: Any) -> Tensor:
        """Return [B, k, V] logits, the same on every rank of the replica.

        Args:
            inputs: [B, n] token ids.
            positions: [B, n] rotary positions.
            entries: [B, k] slots of the segment that reach the head.
            rows: further fields of AttentionRows.
        """
        hidden = self.hidden(inputs, positions, **rows)
        num_real = self._replica.config.model.vocab_size - 1
        shape = (*entries.shape, num_real)
        logits = None
        if hidden is not None:
            first = torch.arange(inputs.shape[0], device=entries.device)[:, None] * inputs.shape[1]
            flat = (self._lean or self._model).logits(hidden, (first + entries).reshape(-1))
            logits = gather_vocabulary(flat, self._model.decoder.tp_group)
            logits = logits[:, :num_real].view(shape)
        replica = self._replica
        return last_stage_tensor(logits, replica.layout, shape, self._dtype, replica.device)

    def hidden(self, inputs: Tensor, positions: Tensor, **rows: Any) -> Tensor | None:
        """Run the segment through all stages; return [n, B, H] on the last one, None on the others."""
        model, layout = self._model, self._replica.layout
        received = None
        if not layout.is_first_stage:
            shape = (inputs.shape[1], inputs.shape[0], model.config.hidden_size)
            received = receive_hidden(layout, shape, self._dtype, self._replica.device)
        described = model.attention_rows(positions, **rows)
        if self._lean is not None:
            hidden = self._lean.hidden_states(inputs, described, received)
        else:
            model.set_input_tensor([received])
            hidden = model.hidden_states(inputs, described)
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
