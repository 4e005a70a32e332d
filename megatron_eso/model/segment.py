"""A stage's layers on a few entries, forward only: the sampler's pass.

Decoding a token feeds one or two entries; then calling Megatron's modules takes longer than their
arithmetic. This pass uses the same parameters in the same order of operations, without autograd functions
and module calls; keys go straight into the cache. tests/test_segment.py compares it with Megatron's block.
Shapes: n entries, R rows, H hidden size, h heads, g key/value heads, d head size, N = n R.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import linear

from megatron_eso.model.attention.core import EsoCoreAttention
from megatron_eso.model.attention.rows import AttentionRows
from megatron_eso.model.eso_model import EsoModel
from megatron_eso.model.specs import with_own_bias
from megatron_eso.parallel.megatron_patches import importing_megatron, without_cuda_names
from megatron_eso.parallel.norms import LayerNorm, RMSNorm, select_entries

with importing_megatron():
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

# Up to this many entries, a product of a float32 weight with a few columns is faster on a CPU than
# `linear`, which for two entries reads the weight at a fifth of the memory's speed (tools/bench_sample.py).
_FEW_ENTRIES = 64


def can_run(model: EsoModel) -> bool:
    """Return whether every layer of the stage is made of the parts this pass knows."""
    layers: list[Any] = list(model.decoder.layers)
    return all(
        type(layer.input_layernorm) in (RMSNorm, LayerNorm)
        and type(layer.self_attention.linear_qkv) is with_own_bias(ColumnParallelLinear)
        and type(layer.self_attention.core_attention) is EsoCoreAttention
        and type(layer.self_attention.linear_proj) is with_own_bias(RowParallelLinear)
        and type(layer.mlp.linear_fc1) is ColumnParallelLinear
        and type(layer.mlp.linear_fc2) is RowParallelLinear
        and layer.self_attention.num_query_groups_per_partition * model.decoder.tp_group.size()
        == model.config.num_query_groups
        for layer in layers
    )


class SegmentPass:
    """Runs segments through one stage."""

    def __init__(self, model: EsoModel) -> None:
        """Prepare a stage for which :func:`can_run` holds, without sequence parallelism."""
        self.model = model
        self._layers = [_Layer(layer, model) for layer in model.decoder.layers]

    def hidden_states(
        self, tokens: Tensor, rows: AttentionRows, received: Tensor | None = None
    ) -> Tensor:
        """Return the stage's last hidden states, [n, R, H].

        Args:
            tokens: [R, n] token ids, read on the first stage.
            rows: positions, pattern and cache.
            received: [n, R, H] the previous stage's output; None on the first stage.
        """
        inputs: Tensor = (
            self.model.embedding(input_ids=tokens, position_ids=None)
            if received is None
            else received
        )
        assert rows.cos is not None and rows.sin is not None
        with without_cuda_names():
            angles = _both_halves(rows.cos, rows.sin)
            hidden = inputs.reshape(-1, inputs.shape[-1]).clone()
            for layer in self._layers:
                layer.add_to(hidden, inputs.shape[:2], rows, angles)
            if self.model.post_process:
                hidden = self.model.decoder.final_layernorm(hidden)  # type: ignore[misc]
        return hidden.view(inputs.shape)

    def logits(self, hidden: Tensor, entries: Tensor) -> Tensor:
        """Return [N, V/T]: the head applied to only the flat entries row * n + slot."""
        weight, bias = self.model.head_weight(), self.model.output_layer.bias
        with without_cuda_names():
            return few_linear(select_entries(hidden, entries), weight, bias)


class _Layer:
    """One transformer layer's parameters."""

    def __init__(self, layer: Any, model: EsoModel) -> None:
        attention, mlp, config = layer.self_attention, layer.mlp, model.config
        self.norm, self.mlp_norm = layer.input_layernorm, layer.pre_mlp_layernorm
        self.qkv, self.proj = attention.linear_qkv, attention.linear_proj
        self.head_norms = (attention.q_layernorm, attention.k_layernorm)
        self.has_head_norms = config.qk_layernorm
        self.fc1, self.fc2 = mlp.linear_fc1, mlp.linear_fc2
        self.activation, self.is_gated = config.activation_func, config.gated_linear_unit
        self.core: EsoCoreAttention = attention.core_attention
        self.groups = attention.num_query_groups_per_partition
        self.head_size = attention.hidden_size_per_attention_head
        self.tp_group = model.decoder.tp_group

    def add_to(
        self,
        hidden: Tensor,
        shape: torch.Size,
        rows: AttentionRows,
        angles: tuple[Tensor, Tensor],
    ) -> None:
        """Add the layer's attention and MLP to the residual stream ``hidden`` [N, H], in place."""
        hidden += self._attention(self.norm(hidden), shape, rows, angles)
        hidden += self._mlp(self.mlp_norm(hidden))

    def _attention(
        self, x: Tensor, shape: torch.Size, rows: AttentionRows, angles: tuple[Tensor, Tensor]
    ) -> Tensor:
        # Weights are ordered group by group: a group's queries, its key, its value.
        mixed = few_linear(x, self.qkv.weight, self.qkv.bias)
        mixed = mixed.view(*shape, self.groups, -1, self.head_size)
        to_turn, value = mixed[:, :, :, :-1], mixed[:, :, :, -1]
        if self.has_head_norms:
            of_query, of_key = self.head_norms
            to_turn = torch.cat([of_query(to_turn[..., :-1, :]), of_key(to_turn[..., -1:, :])], 3)
        turned = _rotate(to_turn, *angles)
        query = turned[:, :, :, :-1].reshape(*shape, -1, self.head_size)
        attended = self.core.attend_rotated(query, turned[:, :, :, -1], value, rows)
        return self._row_parallel(self.proj, attended.reshape(len(x), -1))

    def _mlp(self, x: Tensor) -> Tensor:
        inner = few_linear(x, self.fc1.weight, self.fc1.bias)
        if self.is_gated:
            gate, up = inner.chunk(2, dim=1)
            inner = self.activation(gate) * up
        else:
            inner = self.activation(inner)
        return self._row_parallel(self.fc2, inner)

    def _row_parallel(self, layer: RowParallelLinear, x: Tensor) -> Tensor:
        if self.tp_group.size() == 1:
            return few_linear(x, layer.weight, layer.bias)
        out = few_linear(x, layer.weight, None)
        dist.all_reduce(out, group=self.tp_group)
        return out if layer.bias is None else out + layer.bias


def few_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x [N, i] times weight [o, i] transposed, plus bias, fast for few entries on a CPU."""
    number = x.shape[0]
    if x.dtype is not torch.float32 or x.device.type != "cpu" or number > _FEW_ENTRIES:
        return linear(x, weight, bias)
    # The product with a single column is slower than with two.
    columns = x if number > 1 else torch.cat([x, x])
    out = (weight @ columns.t())[:, :number].t().contiguous()
    return out if bias is None else out.add_(bias)


def _both_halves(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors [n, R, 1, 1, d] of x and of x with its halves swapped; see :func:`_rotate`."""
    return torch.cat([cos, cos], dim=3)[:, :, None], torch.cat([-sin, sin], dim=3)[:, :, None]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [n, R, g, m, d] by the angles of its entries, as ``model.rotary.rotate`` does."""
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, dims=-1), sin)
