"""Fold the official model's constant condition into a plain pre-LayerNorm transformer.

The official Eso-LM always feeds time 0 to its adaptive layer norms, so shift, scale and gate depend only
on the weights: norm(x) w (1 + scale) + shift is a LayerNorm with that scale and bias, and
gate * (W x + b) is a matrix and a bias with scaled rows. This is exact up to rounding, and is computed
in float64. Letters as in official_layout.py; h = heads, d = head size.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from megatron_eso.export.official_layout import num_blocks

_LAYER = "decoder.layers."


def fold(tensors: Mapping[str, Tensor], *, num_heads: int, padded_vocab: int) -> dict[str, Tensor]:
    """Return our weights by full name (``parallel.parameters.Piece.full_name``), in float32.

    Args:
        tensors: official tensors that passed ``require_layout``.
        num_heads: attention heads.
        padded_vocab: rows of our embedding and head; those beyond V are zero.
    """
    official = {name: tensor.double() for name, tensor in tensors.items()}
    condition = constant_condition(official)
    extra = padded_vocab - len(official["vocab_embed.embedding"])
    shift, scale = _modulation(official, "output_layer.", condition, 2)
    ours = {
        "embedding.word_embeddings.weight": pad(
            official["vocab_embed.embedding"], (0, 0, 0, extra)
        ),
        "decoder.final_layernorm.weight": official["output_layer.norm_final.weight"] * (1 + scale),
        "decoder.final_layernorm.bias": shift,
        "output_layer.weight": pad(official["output_layer.linear.weight"], (0, 0, 0, extra)),
        "output_layer.bias": pad(official["output_layer.linear.bias"], (0, extra)),
    }
    for block in range(num_blocks(official)):
        for name, tensor in _fold_block(official, block, condition, num_heads).items():
            ours[f"{_LAYER}{name}[{block}]"] = tensor
    return {name: tensor.float().contiguous() for name, tensor in ours.items()}


def constant_condition(official: Mapping[str, Tensor]) -> Tensor:
    """Return [C]: the embedding of time 0 after its MLP; at time 0 all cosines are 1 and all sines 0."""
    size = official["sigma_map.mlp.0.weight"].shape[1]
    at_zero = torch.zeros(size, dtype=torch.float64)
    at_zero[: size // 2] = 1.0
    inner = official["sigma_map.mlp.0.weight"] @ at_zero + official["sigma_map.mlp.0.bias"]
    outer = official["sigma_map.mlp.2.weight"] @ silu(inner) + official["sigma_map.mlp.2.bias"]
    return silu(outer)


def _modulation(
    official: Mapping[str, Tensor], owner: str, condition: Tensor, parts: int
) -> tuple[Tensor, ...]:
    weight, bias = (official[f"{owner}adaLN_modulation.{kind}"] for kind in ("weight", "bias"))
    return (weight @ condition + bias).chunk(parts)


def _fold_block(
    official: Mapping[str, Tensor], block: int, condition: Tensor, num_heads: int
) -> dict[str, Tensor]:
    """Return one layer's weights under our names."""
    owner = f"blocks.{block}."
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = _modulation(official, owner, condition, 6)

    def of(name: str) -> Tensor:
        return official[owner + name]

    return {
        "self_attention.linear_qkv.layer_norm_weight": of("norm1.weight") * (1 + scale_1),
        "self_attention.linear_qkv.layer_norm_bias": shift_1,
        "self_attention.linear_qkv.weight": interleave_heads(of("attn_qkv.weight"), num_heads),
        "self_attention.linear_proj.weight": of("attn_out.weight") * gate_1[:, None],
        "mlp.linear_fc1.layer_norm_weight": of("norm2.weight") * (1 + scale_2),
        "mlp.linear_fc1.layer_norm_bias": shift_2,
        "mlp.linear_fc1.weight": of("mlp.0.weight"),
        "mlp.linear_fc1.bias": of("mlp.0.bias"),
        "mlp.linear_fc2.weight": of("mlp.2.weight") * gate_2[:, None],
        "mlp.linear_fc2.bias": of("mlp.2.bias") * gate_2,
    }


def interleave_heads(qkv: Tensor, num_heads: int) -> Tensor:
    """Return [3 h d, H] with rows (h, 3, d), Megatron's order, from rows (3, h, d)."""
    rows, hidden = qkv.shape
    return qkv.view(3, num_heads, -1, hidden).transpose(0, 1).reshape(rows, hidden)
