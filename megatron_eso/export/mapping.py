"""Names and layouts of our tensors and of Hugging Face's: one table, read in both directions.

Our tensors are those of a checkpoint (``weights.NAME`` or ``ema.NAME``, with layers stacked along the first
axis). Theirs have Llama's names, with qk_norm Qwen3's, and similar names for the official shape (LayerNorm,
GELU). What the table cannot express is refused.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_eso.config import derive
from megatron_eso.config.schema import ModelConfig
from megatron_eso.errors import CheckpointError

LAYERS = "decoder.layers."
_INPUT, _FC1 = "self_attention.linear_qkv.", "mlp.linear_fc1."


@dataclass(frozen=True)
class Transform:
    """How one of our tensors becomes one or more of theirs, and back."""

    split: Callable[[ModelConfig, Tensor], list[Tensor]]
    join: Callable[[ModelConfig, list[Tensor]], Tensor]
    shapes: Callable[[ModelConfig, tuple[int, ...]], list[tuple[int, ...]]]
    """The shapes of theirs, from the shape of ours."""


@dataclass(frozen=True)
class Rule:
    """One of our tensors (of one layer) and those it becomes; ``{}`` is the layer's number."""

    ours: str
    theirs: tuple[str, ...]
    transform: Transform

    @property
    def is_layered(self) -> bool:
        """True for a tensor inside the layers."""
        return self.ours.startswith(LAYERS)


def _split_qkv(model: ModelConfig, whole: Tensor) -> list[Tensor]:
    groups, size = derive.num_kv_heads(model), derive.head_size(model)
    per_group = model.num_heads // groups
    rest = whole.shape[1:]
    parts = whole.reshape(groups, per_group + 2, size, *rest)
    return [
        parts[:, :per_group].reshape(-1, *rest),
        parts[:, per_group].reshape(-1, *rest),
        parts[:, per_group + 1].reshape(-1, *rest),
    ]


def _join_qkv(model: ModelConfig, parts: list[Tensor]) -> Tensor:
    groups, size = derive.num_kv_heads(model), derive.head_size(model)
    rest = parts[0].shape[1:]
    query = parts[0].reshape(groups, model.num_heads // groups, size, *rest)
    key, value = (part.reshape(groups, 1, size, *rest) for part in parts[1:])
    return torch.cat([query, key, value], dim=1).reshape(-1, *rest)


def _qkv_shapes(model: ModelConfig, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    size, rest = derive.head_size(model), shape[1:]
    short = derive.num_kv_heads(model) * size
    return [(model.num_heads * size, *rest), (short, *rest), (short, *rest)]


def _pad_rows(model: ModelConfig, whole: Tensor) -> Tensor:
    extra = derive.padded_vocab_size(model) - len(whole)
    if not extra:
        return whole
    return torch.cat([whole, whole.new_zeros(extra, *whole.shape[1:])])


COPY = Transform(lambda m, x: [x], lambda m, xs: xs[0], lambda m, s: [s])
ROWS = Transform(
    lambda m, x: [x[: m.vocab_size]],
    lambda m, xs: _pad_rows(m, xs[0]),
    lambda m, s: [(m.vocab_size, *s[1:])],
)
QKV = Transform(_split_qkv, _join_qkv, _qkv_shapes)
HALVES = Transform(
    lambda m, x: list(x.chunk(2)),
    lambda m, xs: torch.cat(xs),
    lambda m, s: [(s[0] // 2, *s[1:])] * 2,
)


def rules(model: ModelConfig) -> list[Rule]:
    """Return the table for one model, in the order of the exported files.

    Raises:
        CheckpointError: if the shape cannot be expressed, naming the settings.
    """
    reasons = inexpressible(model)
    if reasons:
        raise CheckpointError(
            "this architecture has no Hugging Face form:\n  - " + "\n  - ".join(reasons)
        )
    found = [Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ROWS)]
    found += [
        Rule(LAYERS + ours, tuple(f"model.layers.{{}}.{name}" for name in theirs), transform)
        for ours, theirs, transform in _layer_rules(model)
    ]
    kinds = ("weight", "bias") if model.norm == "layernorm" else ("weight",)
    found += [Rule(f"decoder.final_layernorm.{k}", (f"model.norm.{k}",), COPY) for k in kinds]
    if not model.tie_embeddings:
        found.append(Rule("output_layer.weight", ("lm_head.weight",), ROWS))
    if model.head_bias:
        found.append(Rule("output_layer.bias", ("lm_head.bias",), ROWS))
    return found


def _layer_rules(model: ModelConfig) -> Iterator[tuple[str, tuple[str, ...], Transform]]:
    norms = ("weight", "bias") if model.norm == "layernorm" else ("weight",)
    heads = tuple(f"self_attn.{x}_proj" for x in "qkv")
    for kind in norms:
        yield f"{_INPUT}layer_norm_{kind}", (f"input_layernorm.{kind}",), COPY
    for kind in ("weight", "bias") if model.attention_bias else ("weight",):
        yield f"{_INPUT}{kind}", tuple(f"{name}.{kind}" for name in heads), QKV
        yield f"self_attention.linear_proj.{kind}", (f"self_attn.o_proj.{kind}",), COPY
    if model.qk_norm:
        for one in "qk":
            yield f"self_attention.{one}_layernorm.weight", (f"self_attn.{one}_norm.weight",), COPY
    for kind in norms:
        yield f"{_FC1}layer_norm_{kind}", (f"post_attention_layernorm.{kind}",), COPY
    gated = model.activation == "swiglu"
    inner = ("mlp.gate_proj", "mlp.up_proj") if gated else ("mlp.up_proj",)
    for kind in ("weight", "bias") if model.mlp_bias else ("weight",):
        yield f"{_FC1}{kind}", tuple(f"{n}.{kind}" for n in inner), HALVES if gated else COPY
        yield f"mlp.linear_fc2.{kind}", (f"mlp.down_proj.{kind}",), COPY


def shape_of(rule: Rule, model: ModelConfig) -> tuple[int, ...]:
    """Return the shape of a rule's tensor of ours, for one layer."""
    hidden, inner, size = model.hidden_size, derive.ffn_size(model), derive.head_size(model)
    num_ids, groups = derive.padded_vocab_size(model), derive.num_kv_heads(model)
    matrices = {
        "embedding.word_embeddings": (num_ids, hidden),
        "output_layer": (num_ids, hidden),
        "self_attention.linear_qkv": ((model.num_heads + 2 * groups) * size, hidden),
        "self_attention.linear_proj": (hidden, model.num_heads * size),
        "mlp.linear_fc1": (inner * (2 if model.activation == "swiglu" else 1), hidden),
        "mlp.linear_fc2": (hidden, inner),
    }
    module, kind = rule.ours.removeprefix(LAYERS).rsplit(".", 1)
    if module in matrices and kind in ("weight", "bias"):
        return matrices[module] if kind == "weight" else matrices[module][:1]
    return (size,) if module.endswith(("q_layernorm", "k_layernorm")) else (hidden,)


def inexpressible(model: ModelConfig, objective: str = "eso") -> list[str]:
    """Return why a model cannot be exported; empty if it can."""
    reasons = []
    if (model.norm, model.activation) not in (("rmsnorm", "swiglu"), ("layernorm", "gelu")):
        reasons.append(
            f"model.norm={model.norm} with model.activation={model.activation}: only rmsnorm with swiglu "
            "(Llama, Qwen3) and layernorm with gelu (the official Eso-LM shape) have a class"
        )
    if model.qk_norm and model.norm == "layernorm":
        reasons.append("model.qk_norm=true with model.norm=layernorm: no class has LayerNorm heads")
    if model.head_bias and model.norm == "rmsnorm":
        reasons.append("model.head_bias=true with model.norm=rmsnorm: Llama's head has no bias")
    if objective in ("mdlm", "bd3lm"):
        reasons.append(
            f"objective.name={objective}: the exported class attends causally in prediction order, this "
            "model was trained with another mask"
        )
    return reasons


def no_backbone(model: ModelConfig) -> list[str]:
    """Return why a model has no stock architecture (``--format backbone``)."""
    reasons = []
    if model.norm != "rmsnorm":
        reasons.append(
            "only the Llama and Qwen3 shapes are stock architectures, not LayerNorm/GELU"
        )
    if model.qk_norm and model.mlp_bias:
        reasons.append("model.qk_norm=true with model.mlp_bias=true: Qwen3's MLP has no biases")
    return reasons
