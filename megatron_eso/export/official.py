"""Read an official Eso-LM checkpoint (a Lightning file) as our weights and settings.

Only tensors and plain configuration are read (inert_pickle.py). The averaged weights (``ema``) are a
list in the order of the backbone's parameters; ``state_dict`` holds the raw weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_eso.checkpoint.inert_pickle import Inert, plain, read_torch_file
from megatron_eso.config import derive
from megatron_eso.config.schema import ModelConfig, ObjectiveConfig
from megatron_eso.errors import CheckpointError
from megatron_eso.export.official_fold import fold
from megatron_eso.export.official_layout import ROTARY, num_blocks, require_layout, strip_prefix

_ROTARY_BASE = 10000.0


@dataclass(frozen=True)
class OfficialModel:
    """What an official checkpoint holds, in our terms."""

    model: ModelConfig
    objective: ObjectiveConfig
    sequence_length: int
    step: int
    weights: dict[str, Tensor]
    """Folded weights by full name, in float32."""
    tokenizer_json: str | None
    """Content of the tokenizer's ``tokenizer.json``, if the file holds one."""


def read_official(
    path: Path,
    *,
    weights: str = "ema",
    num_heads: int | None = None,
    sequence_length: int | None = None,
) -> OfficialModel:
    """Return the model of an official checkpoint.

    Args:
        path: Lightning file.
        weights: ``ema`` or ``raw``.
        num_heads: attention heads; None: from the file.
        sequence_length: tokens in a row; None: from the file.

    Raises:
        CheckpointError: if the file has another format, or a model that we cannot express.
    """
    content = read_torch_file(path)
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise CheckpointError(f"{path} has no state_dict: it is not a Lightning checkpoint")
    tensors = strip_prefix(content["state_dict"])
    if weights == "ema":
        tensors = averaged(tensors, content.get("ema"), path)
    require_layout(tensors)
    hyper = content.get("hyper_parameters")
    settings = plain(hyper.get("config")) if isinstance(hyper, dict) else None
    settings = settings if isinstance(settings, dict) else {}
    _require_our_variant(settings)
    heads = _num_heads(tensors, settings, num_heads)
    length = sequence_length or _number(settings, "model", "length")
    if length is None:
        raise CheckpointError(f"{path} does not say the row length; give --sequence-length")
    model = _model_config(tensors, heads, int(length))
    return OfficialModel(
        model=model,
        objective=_objective(settings),
        sequence_length=int(length),
        step=int(content.get("global_step", 0)),
        weights=fold(tensors, num_heads=heads, padded_vocab=derive.padded_vocab_size(model)),
        tokenizer_json=_tokenizer_json(hyper),
    )


def averaged(tensors: Mapping[str, Tensor], ema: Any, path: Path) -> dict[str, Tensor]:
    """Return the tensors with the raw parameters replaced by the averaged ones.

    Raises:
        CheckpointError: if there is no average, or it does not match the parameters.
    """
    shadow = ema.get("shadow_params") if isinstance(ema, dict) else None
    if not (isinstance(shadow, list) and shadow and all(isinstance(s, Tensor) for s in shadow)):
        raise CheckpointError(f"{path} holds no averaged weights; import with --weights raw")
    # A tied tensor has two names and one place among the parameters.
    places: dict[tuple[int, int], int] = {}
    where = {}
    for name, tensor in tensors.items():
        if name != ROTARY:
            where[name] = places.setdefault((tensor.data_ptr(), tensor.numel()), len(places))
    if len(places) != len(shadow):
        raise CheckpointError(
            f"{path} holds {len(shadow)} averaged parameters for {len(places)} raw ones"
        )
    wrong = [n for n, at in where.items() if shadow[at].shape != tensors[n].shape]
    if wrong:
        raise CheckpointError(f"the averaged weights of {', '.join(wrong)} have another shape")
    return {name: shadow[where[name]] if name in where else t for name, t in tensors.items()}


def _require_our_variant(settings: dict[str, Any]) -> None:
    """Refuse models whose passes differ from our objective's."""
    algo = settings.get("algo")
    if not isinstance(algo, dict):
        return
    wanted = {
        "backbone": "esolm_dit",
        "diffusion_attn_mode": "causal",
        "sequential_attn_mode": "causal",
        "time_conditioning": False,
    }
    wrong = [
        f"algo.{name}={algo[name]!r} (only {value!r} is imported)"
        for name, value in wanted.items()
        if name in algo and algo[name] != value
    ]
    if wrong:
        raise CheckpointError("the checkpoint holds another kind of model: " + "; ".join(wrong))


def _num_heads(tensors: Mapping[str, Tensor], settings: dict[str, Any], asked: int | None) -> int:
    """Return the number of heads; stored rotary frequencies (half a head long) must agree with it."""
    hidden = tensors["vocab_embed.embedding"].shape[1]
    heads = asked or _number(settings, "model", "n_heads")
    rotary = tensors.get(ROTARY)
    if heads is None and rotary is not None:
        heads = hidden // (2 * len(rotary))
    if heads is None:
        raise CheckpointError("the file does not say the number of heads; give --num-heads")
    heads = int(heads)
    if hidden % heads or (hidden // heads) % 2:
        raise CheckpointError(
            f"{heads} heads do not divide the width {hidden} into even sizes; give --num-heads"
        )
    if rotary is not None:
        size = hidden // heads
        exponent = torch.arange(0, size, 2, dtype=torch.float64) / size
        expected = _ROTARY_BASE**-exponent
        if rotary.shape != expected.shape or not torch.allclose(
            rotary.double(), expected, rtol=1e-5
        ):
            raise CheckpointError(
                f"{ROTARY} is not that of {heads} heads of {size} with base {_ROTARY_BASE:g}"
            )
    return heads


def _model_config(tensors: Mapping[str, Tensor], heads: int, length: int) -> ModelConfig:
    vocab, hidden = tensors["vocab_embed.embedding"].shape
    inner = tensors["blocks.0.mlp.0.weight"].shape[0]
    return ModelConfig(
        hidden_size=hidden,
        num_layers=num_blocks(tensors),
        num_heads=heads,
        ffn_size=None if inner == 4 * hidden else inner,
        vocab_size=vocab,
        max_length=length,
        norm="layernorm",
        norm_eps=1e-5,
        activation="gelu",
        mlp_bias=True,
        head_bias=True,
        rotary_base=_ROTARY_BASE,
    )


def _objective(settings: dict[str, Any]) -> ObjectiveConfig:
    alpha_0 = _number(settings, "algo", "alpha_0")
    eps = _number(settings, "training", "sampling_eps")
    return ObjectiveConfig(
        alpha_0=1.0 if alpha_0 is None else float(alpha_0),
        noise_eps=1e-3 if eps is None else float(eps),
    )


def _number(settings: dict[str, Any], section: str, name: str) -> float | None:
    """Return a number from the configuration; None if it is missing or not a plain number."""
    values = settings.get(section)
    value = values.get(name) if isinstance(values, dict) else None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _tokenizer_json(hyper: Any) -> str | None:
    """Return the JSON text inside a pickled fast tokenizer, without building the tokenizer."""
    outer = hyper.get("tokenizer") if isinstance(hyper, dict) else None
    fields = outer.state if isinstance(outer, Inert) else None
    inner = fields.get("_tokenizer") if isinstance(fields, dict) else None
    encoded = inner.state if isinstance(inner, Inert) else None
    if isinstance(encoded, Inert) and encoded.origin == "_codecs.encode" and encoded.args:
        text = encoded.args[0]
        return text.encode("latin1").decode() if isinstance(text, str) else None
    return encoded.decode() if isinstance(encoded, bytes) else None
