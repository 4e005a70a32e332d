"""What tests ask of an installed or unpacked Megatron-Core: its configuration for every recipe."""

from typing import Any

from megatron_eso.config import load_config
from megatron_eso.model.build import resolve_precision
from megatron_eso.model.megatron_config import transformer_config
from megatron_eso.parallel.megatron_patches import importing_megatron, silence_megatron_messages
from megatron_eso.parallel.optimizer import buffer_settings, optimizer_settings

with importing_megatron():
    import megatron.core

SHAPE = [
    "model.hidden_size=1024", "model.num_layers=8", "model.num_heads=8", "model.num_kv_heads=4",
    "train.sequence_length=1024", "train.steps=10",
]  # fmt: skip
BF16 = ["precision.dtype=bf16", "precision.backend=te"]
TENSORWISE = [*BF16, "precision.fp8=tensorwise"]
RECIPES = {
    "fp32": ["precision.dtype=fp32"],
    "bf16": BF16,
    "bf16, te attention": [*BF16, "precision.attention=te"],
    "delayed": [*BF16, "precision.fp8=delayed", "precision.fp8_amax_history=16"],
    "tensorwise": TENSORWISE,
    "bf16 ends": [*TENSORWISE, "precision.bf16_first_layers=1", "precision.bf16_last_layers=2"],
    "fp8 attention": [*TENSORWISE, "precision.fp8_attention=true"],
    "fp8 parameters": [*TENSORWISE, "precision.fp8_params=true"],
}
FIELDS = (
    "bf16", "fp8", "fp8_recipe", "fp8_amax_history_len", "fp8_amax_compute_algo", "fp8_param",
    "fp8_dot_product_attention", "fp8_multi_head_attention", "first_last_layers_bf16",
    "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16",
)  # fmt: skip


def megatron_settings() -> dict[str, Any]:
    """Return Megatron-Core's version and, by recipe, the contents of its own configuration classes."""
    silence_megatron_messages()
    found: dict[str, Any] = {"version": megatron.core.__version__}
    for name, overrides in RECIPES.items():
        config = load_config(None, [*SHAPE, *overrides])
        config = resolve_precision(config, config.precision.dtype)
        settings = transformer_config(config.model, config.parallel, config.precision, on_gpu=False)
        values = {field: getattr(settings, field) for field in FIELDS}
        values["attention_backend"] = settings.attention_backend.name
        values["params_dtype"] = str(settings.params_dtype)
        values["gather_fp8"] = buffer_settings(
            config.parallel, settings, on_gpu=False
        ).fp8_param_gather
        values["optimizer_recipe"] = optimizer_settings(config.optimizer, settings).fp8_recipe
        found[name] = values
    return found
