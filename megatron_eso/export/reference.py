"""An independent forward pass over a checkpoint's own tensors, one layer in memory at a time.

It shares no code with the exported model or the mapping: weights under our names, heads one by one,
explicit positions and visibility. Exports are compared with it. Letters: n = entries of a row, H = hidden
size, V = vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from megatron_eso.config import derive
from megatron_eso.config.schema import ModelConfig

Read = Callable[[str, int | None], Tensor]
"""Returns one tensor in float32 by its name, of one layer if a number is given."""


@dataclass(frozen=True)
class Row:
    """One row of input."""

    tokens: Tensor
    """[n] ids."""
    positions: Tensor
    """[n] places in reading order."""
    visible: Tensor
    """[n, n] True where entry i may look at entry j."""


def reference_logits(model: ModelConfig, read: Read, rows: list[Row]) -> list[Tensor]:
    """Return [n, V] logits of every row, the mask token's at -inf."""
    embedding = read("embedding.word_embeddings.weight", None)
    hidden = [embedding[row.tokens] for row in rows]
    del embedding
    for layer in range(model.num_layers):
        get = _layer_reader(read, layer)
        normed = [_norm(model, h, get, "self_attention.linear_qkv.layer_norm_") for h in hidden]
        added = _attention(model, normed, rows, get)
        hidden = [h + a for h, a in zip(hidden, added, strict=True)]
        normed = [_norm(model, h, get, "mlp.linear_fc1.layer_norm_") for h in hidden]
        hidden = [h + a for h, a in zip(hidden, _mlp(model, normed, get), strict=True)]
    hidden = [
        _norm(model, h, lambda name: read(name, None), "decoder.final_layernorm.") for h in hidden
    ]
    name = "embedding.word_embeddings" if model.tie_embeddings else "output_layer"
    head = read(f"{name}.weight", None)[: model.vocab_size]
    found = [h @ head.T for h in hidden]
    if model.head_bias:
        found = [x + read("output_layer.bias", None)[: model.vocab_size] for x in found]
    for logits in found:
        logits[:, model.vocab_size - 1] = -torch.inf
    return found


def _layer_reader(read: Read, layer: int) -> Callable[[str], Tensor]:
    return lambda name: read(f"decoder.layers.{name}", layer)


def _norm(model: ModelConfig, x: Tensor, get: Callable[[str], Tensor], name: str) -> Tensor:
    if model.norm == "layernorm":
        x = x - x.mean(dim=1, keepdim=True)
    x = x / (x.pow(2).mean(dim=1, keepdim=True) + model.norm_eps).sqrt()
    x = x * get(name + "weight")
    return x + get(name + "bias") if model.norm == "layernorm" else x


def _attention(
    model: ModelConfig, hidden: list[Tensor], rows: list[Row], get: Callable[[str], Tensor]
) -> list[Tensor]:
    groups, size = derive.num_kv_heads(model), derive.head_size(model)
    per_group = model.num_heads // groups
    weight = get("self_attention.linear_qkv.weight")
    bias = get("self_attention.linear_qkv.bias") if model.attention_bias else None
    out = get("self_attention.linear_proj.weight")
    scales = [get(f"self_attention.{x}_layernorm.weight") if model.qk_norm else None for x in "qk"]
    found = []
    for x, row in zip(hidden, rows, strict=True):
        projected = x @ weight.T if bias is None else x @ weight.T + bias
        blocks = projected.view(len(x), groups, per_group + 2, size)
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
        found.append(torch.cat(heads, dim=1) @ out.T)
    if model.attention_bias:
        found = [x + get("self_attention.linear_proj.bias") for x in found]
    return found


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


def _mlp(model: ModelConfig, hidden: list[Tensor], get: Callable[[str], Tensor]) -> list[Tensor]:
    inner, outer = get("mlp.linear_fc1.weight"), get("mlp.linear_fc2.weight")
    first = get("mlp.linear_fc1.bias") if model.mlp_bias else None
    second = get("mlp.linear_fc2.bias") if model.mlp_bias else None
    found = []
    for x in hidden:
        y = x @ inner.T if first is None else x @ inner.T + first
        if model.activation == "swiglu":
            gate, up = y.chunk(2, dim=1)
            y = silu(gate) * up
        else:
            y = gelu(y, approximate="tanh")
        y = y @ outer.T
        found.append(y if second is None else y + second)
    return found
