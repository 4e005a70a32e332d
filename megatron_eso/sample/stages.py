"""One forward pass of a sampler through all pipeline stages; every rank gets the logits.

Letters: B = rows, n = entries of the segment, H = hidden size, V = vocabulary without the mask token.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_eso.model.eso_model import EsoModel
from megatron_eso.model.layer_graphs import can_capture
from megatron_eso.model.replica import Replica
from megatron_eso.model.segment import SegmentPass, can_run
from megatron_eso.parallel.exchange import last_stage_tensor, receive_hidden, send_hidden
from megatron_eso.sample.graphs import StepGraphs


class Stages:
    """The forward pass of a sampler through all pipeline stages."""

    def __init__(self, replica: Replica, *, cuda_graphs: bool = True) -> None:
        """Prepare this rank's stage: one chunk, without sequence parallelism.

        Args:
            replica: the model.
            cuda_graphs: steps may run from graphs, if the whole model lies on this rank's GPU.
        """
        self._model: EsoModel = replica.chunks[0]  # type: ignore[assignment]
        self._replica = replica
        self._dtype = next(self._model.parameters()).dtype
        # Layers made of other parts (Transformer Engine's) run through Megatron's modules.
        self._lean = SegmentPass(self._model) if can_run(self._model) else None
        layout, tensor_group = replica.layout, self._model.decoder.tp_group
        self._graphs: StepGraphs | None = None
        is_alone = layout.pipeline_size * tensor_group.size() == 1
        if cuda_graphs and self._lean is not None and is_alone and can_capture(replica.device):
            self._graphs = StepGraphs(self._dtype, self._model.head_weight().shape[0])

    def logits(self, inputs: Tensor, positions: Tensor, entries: Tensor, **rows: Any) -> Tensor:
        """Return [B, k, V] logits, the same on every rank of the replica.

        Args:
            inputs: [B, n] token ids.
            positions: [B, n] rotary positions.
            entries: [B, k] slots of the segment that reach the head.
            rows: further fields of AttentionRows.
        """
        logits = None
        if self._graphs is not None:
            logits = self._graphs.logits(self._whole_pass, inputs, positions, entries, **rows)
        if logits is None:
            logits = self._whole_pass(inputs, positions, entries, **rows)
        replica, num_real = self._replica, self._replica.config.model.vocab_size - 1
        shape = (*entries.shape, num_real)
        if logits is not None:
            logits = logits[:, :num_real].view(shape)
        return last_stage_tensor(logits, replica.layout, shape, self._dtype, replica.device)

    def _whole_pass(
        self, inputs: Tensor, positions: Tensor, entries: Tensor, **rows: Any
    ) -> Tensor | None:
        """Return logits [B k, V], here including the mask token's, on the last stage; else None."""
        hidden = self.hidden(inputs, positions, **rows)
        if hidden is None:
            return None
        first = torch.arange(inputs.shape[0], device=entries.device)[:, None] * inputs.shape[1]
        flat = (self._lean or self._model).logits(hidden, (first + entries).reshape(-1))
        return gather_vocabulary(flat, self._model.decoder.tp_group)

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
