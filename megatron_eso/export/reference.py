"""An independent forward pass over a checkpoint's own tensors, one layer in memory at a time.

Exports are compared with it, so it shares no code with the exported model or the mapping: weights have our
names, heads run one by one, positions and visibility are explicit. Letters: n = entries of a row,
g = key/value heads, m = query heads of each, d = head size, V = vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from megatron_eso.config import derive
from megatron_eso.config.schema import ModelConfig

Read = Callable[[str, int | None], Tensor]
"""Returns a tensor by name in float32; if a number is given, that layer's."""


@dataclass(frozen=True)
class Row:
    """One row of input."""

    tokens: Tensor
    """[n] ids."""
    positions: Tensor
    """[n] places in reading order."""
    visible: Tensor
    """[n, n] True where entry i sees entry j."""


def reference_logits(model: ModelConfig, read: Read, rows: list[Row]) -> list[Tensor]:
    """Return every row's logits [n, V]; the mask token's are -inf."""
    embedding = read("embedding.word_embeddings.weight", None)
    # All rows' entries are concatenated, so that each weight is read and multiplied once.
    hidden = embedding[torch.cat([row.tokens for row in rows])]
    del embedding
    for layer in range(model.num_layers):
        get = _layer_reader(read, layer)
        normed = _norm(model, hidden, get, "self_attention.linear_qkv.layer_norm_")
        hidden = hidden + _attention(model, normed, rows, get)
        hidden = hidden + _mlp(model, _norm(model, hidden, get, "mlp.linear_fc1.layer_norm_"), get)
    hidden = _norm(model, hidden, lambda name: read(name, None), "decoder.final_layernorm.")
    name = "embedding.word_embeddings" if model.tie_embeddings else "output_layer"
    logits = hidden @ read(f"{name}.weight", None)[: model.vocab_size].T
    if model.head_bias:
        logits = logits + read("output_layer.bias", None)[: model.vocab_size]
    logits[:, model.vocab_size - 1] = -torch.inf
    return list(logits.split([len(row.tokens) for row in rows]))


def _layer_reader(read: Read, layer: int) -> Callable[[str], Tensor]:
    return lambda name: read(f"decoder.layers.{name}", layer)


def _norm(model: ModelConfig, x: Tensor, get: Callable[[str], Tensor], name: str) -> Tensor:
    if model.norm == "layernorm":
        x = x - x.mean(dim=1, keepdim=True)
    x = x / (x.pow(2).mean(dim=1, keepdim=True) + model.norm_eps).sqrt()
    x = x * get(name + "weight")
    return x + get(name + "bias") if model.norm == "layernorm" else x


def _attention(
    model: ModelConfig, x: Tensor, rows: list[Row], get: Callable[[str], Tensor]
) -> Tensor:
    groups, size = derive.num_kv_heads(model), derive.head_size(model)
    projected = x @ get("self_attention.linear_qkv.weight").T
    if model.attention_bias:
        projected = projected + get("self_attention.linear_qkv.bias")
    blocks = projected.view(len(x), groups, model.num_heads // groups + 2, size)
    scales = [
        get(f"self_attention.{one}_layernorm.weight") if model.qk_norm else None for one in "qk"
    ]
    of_rows = zip(blocks.split([len(row.tokens) for row in rows]), rows, strict=True)
    attended = torch.cat([_heads(model, block, row, scales) for block, row in of_rows])
    found = attended @ get("self_attention.linear_proj.weight").T
    return found + get("self_attention.linear_proj.bias") if model.attention_bias else found


def _heads(model: ModelConfig, blocks: Tensor, row: Row, scales: list[Tensor | None]) -> Tensor:
    """Return [n, heads * d] for one row; ``blocks`` [n, g, m + 2, d] holds each group's q.., k, v."""
    per_group, size = blocks.shape[2] - 2, blocks.shape[3]
    heads = []
    for head in range(model.num_heads):
        group, within = divmod(head, per_group)
        query, key = blocks[:, group, within], blocks[:, group, per_group]
        query, key = (
            _rotate(_head_norm(model, y, scale), row.positions, model.rotary_base)
            for y, scale in zip((query, key), scales, strict=True)
        )
        scores = (query @ key.T / size**0.5).masked_fill(~row.visible, -torch.inf)
        heads.append(torch.softmax(scores, dim=1) @ blocks[:, group, per_group + 1])
    return torch.cat(heads, dim=1)


def _head_norm(model: ModelConfig, x: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return x
    return x / (x.pow(2).mean(dim=1, keepdim=True) + model.norm_eps).sqrt() * scale


def _rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    half = x.shape[1] // 2
    frequency = float(base) ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = positions[:, None].double() * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[:, :half], x[:, half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=1)


def _mlp(model: ModelConfig, x: Tensor, get: Callable[[str], Tensor]) -> Tensor:
    y = x @ get("mlp.linear_fc1.weight").T
    if model.mlp_bias:
        y = y + get("mlp.linear_fc1.bias")
    if model.activation == "swiglu":
        gate, up = y.chunk(2, dim=1)
        y = silu(gate) * up
    else:
        y = gelu(y, approximate="tanh")
    y = y @ get("mlp.linear_fc2.weight").T
    return y + get("mlp.linear_fc2.bias") if model.mlp_bias else y
