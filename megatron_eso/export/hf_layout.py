"""A Hugging Face config.json in our terms; one that cannot be expressed is refused with every reason."""

from dataclasses import fields
from typing import Any

from megatron_eso.config.schema import ModelConfig, ObjectiveConfig
from megatron_eso.errors import CheckpointError
from megatron_eso.export.describe import FACTS

OURS = ("esolm", "esolm_dit")
_KNOWN = ("llama", "qwen3", *OURS)
_OF_OBJECTIVE = (
    "alpha_0",
    "diffusion_fraction",
    "noise_eps",
)  # the settings that our own classes read


def has_mask(config: dict[str, Any]) -> bool:
    """Return whether the weights have a row for the mask token: so in all our exports, also stock ones."""
    return config["model_type"] in OURS or config.get("mask_token_id") is not None


def model_of(config: dict[str, Any]) -> ModelConfig:
    """Return the model's shape; ``vocab_size`` excludes the mask token unless :func:`has_mask`.

    Raises:
        CheckpointError: naming every setting that has no counterpart here.
    """
    reasons = _reasons(config)
    if reasons:
        raise CheckpointError("this model cannot be imported:\n  - " + "\n  - ".join(reasons))
    kind = config["model_type"]
    is_dit = kind == "esolm_dit"
    heads = int(config["num_attention_heads"])
    return ModelConfig(
        hidden_size=int(config["hidden_size"]),
        num_layers=int(config["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=_num_kv_heads(config),
        head_size=_head_size(config),
        ffn_size=int(config["intermediate_size"]),
        vocab_size=int(config["vocab_size"]),
        max_length=int(config["max_position_embeddings"]),
        norm="layernorm" if is_dit else "rmsnorm",
        norm_eps=float(config["rms_norm_eps"]),
        activation="gelu" if is_dit else "swiglu",
        attention_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
        head_bias=bool(config.get("head_bias", False)),
        qk_norm=kind == "qwen3" or bool(config.get("qk_norm", False)),
        rotary_base=rope_theta(config),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


def objective_of(
    config: dict[str, Any], facts: dict[str, Any]
) -> tuple[ObjectiveConfig, list[str]]:
    """Return the objective the model was trained for, and a remark if that is not recorded.

    Args:
        config: config.json; its settings of the objective take precedence, as transformers reads them.
        facts: what our export wrote beside it; empty for another program's model.

    Raises:
        CheckpointError: if a version with other settings wrote the export.
    """
    noted = dict(facts.get("objective") or {"alpha_0": facts.get("alpha_0", 1.0)})
    unknown = set(noted) - {field.name for field in fields(ObjectiveConfig)}
    if unknown:
        raise CheckpointError(
            f"{FACTS} is of another version: it has objective.{', objective.'.join(sorted(unknown))}, "
            "unknown here"
        )
    objective = ObjectiveConfig(**noted | {n: config[n] for n in _OF_OBJECTIVE if n in config})
    if not has_mask(config) or "objective" in facts or "alpha_0" in config:
        return objective, []
    return objective, [
        f"{FACTS} does not name the objective; it is taken to be eso with alpha_0 = {objective.alpha_0}"
    ]


def rope_theta(config: dict[str, Any]) -> float:
    """Return the rotary base; transformers 4 and 5 spell it differently."""
    parameters = config.get("rope_parameters") or {}
    return float(config.get("rope_theta") or parameters.get("rope_theta") or 10000.0)


def _num_kv_heads(config: dict[str, Any]) -> int:
    """Return the number of key/value heads; if missing, transformers' default."""
    default = 32 if config["model_type"] == "qwen3" else None
    return int(config.get("num_key_value_heads", default) or config["num_attention_heads"])


def _head_size(config: dict[str, Any]) -> int:
    """Return the width of a head; if missing, transformers' default."""
    quotient = int(config["hidden_size"]) // int(config["num_attention_heads"])
    return int(config.get("head_dim") or (128 if config["model_type"] == "qwen3" else quotient))


def _reasons(config: dict[str, Any]) -> list[str]:
    kind = config.get("model_type")
    if kind not in _KNOWN:
        return [f"model_type={kind!r}: only {', '.join(_KNOWN)} are read"]
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
              "max_position_embeddings", "rms_norm_eps")  # fmt: skip
    reasons = [f"{name} is missing in config.json" for name in needed if not config.get(name)]
    if not reasons and int(config["num_attention_heads"]) % _num_kv_heads(config):
        reasons.append(
            f"num_attention_heads={config['num_attention_heads']} is not a multiple of "
            f"num_key_value_heads={_num_kv_heads(config)}"
        )
    mask, size = config.get("mask_token_id"), config.get("vocab_size")
    if mask is not None and size is not None and mask != size - 1:
        reasons.append(
            f"mask_token_id={mask} with vocab_size={size}: the mask token must be the last id; remove "
            "mask_token_id from config.json to have a new one added"
        )
    activation = config.get("hidden_act", "silu")
    wanted = "gelu_pytorch_tanh" if kind == "esolm_dit" else "silu"
    if activation != wanted:
        reasons.append(f"hidden_act={activation!r}: only {wanted!r} is there")
    for spelling in ("rope_scaling", "rope_parameters"):
        scaling = config.get(spelling) or {}
        name = scaling.get("rope_type", scaling.get("type", "default"))
        if name != "default":
            reasons.append(
                f"{spelling} of type {name!r}: the rotary table here is plain (model.rotary_base), so "
                "without the scaled angles this would be another model"
            )
        if scaling.get("partial_rotary_factor", 1.0) != 1.0:
            reasons.append("partial_rotary_factor: only whole heads are rotated here")
    plain, new = config.get("rope_theta"), (config.get("rope_parameters") or {}).get("rope_theta")
    if plain is not None and new is not None and plain != new:
        reasons.append(f"rope_theta={plain} and rope_parameters.rope_theta={new} disagree")
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or []):
        reasons.append("sliding-window attention: every entry sees all earlier ones here")
    if config.get("quantization_config"):
        reasons.append("quantized weights: import the unquantized ones")
    return reasons
