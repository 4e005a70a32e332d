"""The files beside the exported weights: configs, tokenizer, model files."""

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_eso.config import derive
from megatron_eso.config.schema import ModelConfig, ObjectiveConfig
from megatron_eso.data.tokenizer import Tokenizer
from megatron_eso.errors import CheckpointError

MODEL_FILES = (
    "configuration_esolm.py", "decoding_esolm.py", "generation_esolm.py", "modeling_esolm.py"
)  # fmt: skip
FACTS = "esolm_export.json"
# The facts that are read back, with their types; earlier versions wrote no objective or remarks.
_FACTS: dict[str, Any] = {
    "source": str, "step": int, "weights": str, "dtype": str, "not_exported": list,
    "sequence_length": (int, type(None)), "objective": (dict, type(None)), "remarks": (list, type(None)),
}  # fmt: skip
DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16"}


def model_type(model: ModelConfig, kind: str) -> tuple[str, str]:
    """Return model type and class name for a format (``esolm`` or ``backbone``)."""
    if kind == "backbone":
        return ("qwen3", "Qwen3ForCausalLM") if model.qk_norm else ("llama", "LlamaForCausalLM")
    if model.norm == "layernorm":
        return "esolm_dit", "EsoLMDiTForCausalLM"
    return "esolm", "EsoLMForCausalLM"


def config_json(
    model: ModelConfig, objective: ObjectiveConfig, *, kind: str, dtype: str, end_id: int | None
) -> dict[str, Any]:
    """Return config.json, with both spellings where transformers 4 and 5 differ."""
    name, architecture = model_type(model, kind)
    mask = model.vocab_size - 1
    has_leading_mask = objective.name == "ar" and objective.leading_mask
    theta = float(model.rotary_base)
    config: dict[str, Any] = {
        "model_type": name,
        "architectures": [architecture],
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": derive.ffn_size(model),
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": derive.num_kv_heads(model),
        "head_dim": derive.head_size(model),
        "max_position_embeddings": model.max_length,
        "rms_norm_eps": model.norm_eps,
        "hidden_act": "silu" if model.activation == "swiglu" else "gelu_pytorch_tanh",
        "attention_bias": model.attention_bias,
        "mlp_bias": model.mlp_bias,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "dtype": DTYPE_NAMES[dtype],
        "torch_dtype": DTYPE_NAMES[dtype],
        "bos_token_id": mask if has_leading_mask else end_id,
        "eos_token_id": end_id,
        "pad_token_id": end_id,
        "mask_token_id": mask,
    }
    if kind == "esolm":
        # AR with a leading mask has an input that no Eso-LM pass has; see require_expressible.
        config |= {
            "qk_norm": model.qk_norm,
            "head_bias": model.head_bias,
            "alpha_0": objective.alpha_0,
            "diffusion_fraction": objective.diffusion_fraction,
            "noise_eps": objective.noise_eps,
            "auto_map": {
                "AutoConfig": "configuration_esolm."
                + ("EsoLMDiTConfig" if name == "esolm_dit" else "EsoLMConfig"),
                "AutoModelForCausalLM": f"modeling_esolm.{architecture}",
            },
        }
    elif model.qk_norm:
        config |= {
            "use_sliding_window": False,
            "layer_types": ["full_attention"] * model.num_layers,
        }
    return config


def read_tokenizer(path: Path | None, model: ModelConfig) -> Tokenizer | None:
    """Return the tokenizer; refuse one with more ids than the model's vocabulary has room for.

    Raises:
        CheckpointError: naming the tokenizer's highest id and the mask token's.
    """
    if path is None:
        return None
    tokenizer = Tokenizer(path, requires_end=False)
    if tokenizer.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"tokenizer {path} has ids up to {tokenizer.vocab_size - 2}, but the model's mask token is id "
            f"{model.vocab_size - 1}: text would be read as masks or overrun the embedding; give the "
            "tokenizer the model was trained with (--tokenizer FILE)"
        )
    return tokenizer


def tokenizer_remarks(
    tokenizer: Tokenizer | None, model: ModelConfig, trained_with: str | None
) -> list[str]:
    """Return what may be wrong with a tokenizer whose ids all have a row in the embedding.

    Args:
        tokenizer: the tokenizer to export.
        model: its vocabulary includes the mask token.
        trained_with: sha256 of the training data's tokenizer; None: not known.

    Raises:
        CheckpointError: if it has fewer ids than the training data's tokenizer.
    """
    if tokenizer is None:
        return []
    ids, rows = tokenizer.vocab_size - 1, model.vocab_size - 1
    if ids < rows and trained_with is not None:
        raise CheckpointError(
            f"tokenizer {tokenizer.path} has {ids} ids, but the one that the model was trained with has "
            f"{rows} (sha256 {trained_with}): text would be encoded and decoded wrongly; give that one "
            "(--tokenizer FILE)"
        )
    if ids < rows:
        return [
            f"the tokenizer has {ids} ids, but the embedding {rows}: sample and eval refuse them together; "
            "give the tokenizer the model was trained with (--tokenizer FILE), or, if the embedding has "
            "spare rows, import the model with --cut-vocabulary"
        ]
    if trained_with not in (None, tokenizer.sha256):
        return [
            f"{tokenizer.path} (sha256 {tokenizer.sha256}) is not the file that the model was trained with "
            f"(sha256 {trained_with}): if it is not the same tokenizer written differently, text will be "
            "encoded and decoded wrongly"
        ]
    return []


def write_beside(
    folder: Path,
    config: dict[str, Any],
    objective: ObjectiveConfig,
    *,
    tokenizer: Tokenizer | None,
    kind: str,
    max_length: int,
) -> None:
    """Write config.json, generation_config.json, the tokenizer's files and the model's .py files."""
    _dump(folder / "config.json", config)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation: dict[str, Any] = {name: config[name] for name in names}
    if objective.name == "ar":  # a stock class could draw the mask, whose logit is not trained
        generation["suppress_tokens"] = [config["mask_token_id"]]
    if kind == "esolm":
        generation["max_new_tokens"] = max(1, min(256, max_length // 2))
        for name in MODEL_FILES:
            shutil.copyfile(Path(__file__).parent / "hf" / name, folder / name)
    _dump(folder / "generation_config.json", generation)
    if tokenizer is None:
        return
    (folder / "tokenizer.json").write_bytes(without_additions(tokenizer.path.read_bytes()))
    end = tokenizer.end_id
    end_text = None if end is None else tokenizer.decode([end])
    _dump(
        folder / "tokenizer_config.json",
        {
            # transformers 5 has a new name for this class, which 4 does not know.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_length,
            # The tokenizer does not know the mask token.
            "bos_token": end_text if config["bos_token_id"] == end else None,
            "eos_token": end_text,
            "pad_token": end_text,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        },
    )


def without_additions(tokenizer_json: bytes) -> bytes:
    """Return a tokenizer.json that adds no special tokens around a text; unchanged if it adds none.

    Training rows and ``sample --prompt`` have none, whatever the tokenizer's original model used.
    """
    content = json.loads(tokenizer_json)
    kept = _adding_nothing(content.get("post_processor"))
    if kept == content.get("post_processor"):
        return tokenizer_json
    return json.dumps(content | {"post_processor": kept}, ensure_ascii=False, indent=2).encode()


def _adding_nothing(processor: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the parts of a post-processor that add no tokens: ByteLevel, which trims offsets."""
    if processor is None or processor["type"] == "ByteLevel":
        return processor
    parts = map(_adding_nothing, processor.get("processors", []))
    kept = [part for part in parts if part is not None]
    return processor | {"processors": kept} if kept else None


def read_facts(folder: Path) -> dict[str, Any]:
    """Return what our export wrote about itself; empty for another program's model.

    Raises:
        CheckpointError: if the file is damaged.
    """
    file = folder / FACTS
    if not file.is_file():
        return {}
    try:
        facts = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); export again") from None
    if not isinstance(facts, dict):
        raise CheckpointError(f"{file} is damaged: it is not an object; export again")
    wrong = [
        f"{name}={facts.get(name)!r:.40}"
        for name, kind in _FACTS.items()
        if not isinstance(facts.get(name), kind)
    ]
    if wrong:
        raise CheckpointError(f"{file} is damaged: {', '.join(wrong)}; export again")
    return facts


def _dump(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
