"""The one translation from our configuration to Megatron-Core's TransformerConfig."""

from typing import Any

import torch
from torch.nn.functional import silu

from megatron_eso.config import derive
from megatron_eso.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_eso.parallel.megatron_patches import importing_megatron

with importing_megatron():
    from megatron.core.transformer.enums import AttnBackend
    from megatron.core.transformer.transformer_config import TransformerConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """Return GELU in its tanh form, as in the official Eso-LM code."""
    return torch.nn.functional.gelu(x, approximate="tanh")


def _leave_as_is(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _zeros(weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.init.zeros_(weight)


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    *,
    on_gpu: bool,
) -> TransformerConfig:
    """Return Megatron's configuration; ``precision.dtype`` must be resolved (not auto)."""
    dtype = DTYPES[precision.dtype]
    fp8 = _fp8_settings(precision) if precision.fp8 != "off" else {}
    # A weight kept in FP8 is rounded as soon as it is made. In memory that nobody has written to, its
    # largest value may be anything, and it would set the scale for a whole history.
    init = _zeros if precision.fp8_params else _leave_as_is
    recompute = {"none": None, "attention": "selective", "full": "full"}[parallel.recompute]
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=derive.num_kv_heads(model),
        kv_channels=derive.head_size(model),
        ffn_hidden_size=derive.ffn_size(model),
        normalization="RMSNorm" if model.norm == "rmsnorm" else "LayerNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=model.activation == "swiglu",
        activation_func=silu if model.activation == "swiglu" else gelu_tanh,
        add_bias_linear=model.mlp_bias,
        add_qkv_bias=model.attention_bias,
        qk_layernorm=model.qk_norm,
        hidden_dropout=model.dropout,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=(
            parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
        ),
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence and parallel.tensor > 1,
        tp_comm_overlap=derive.has_user_buffers(parallel, precision),
        recompute_granularity=recompute,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        calculate_per_token_loss=True,
        # Weights come from initial_weights.py, the same for every layout. Megatron must still go
        # through its own initialization: only there does it mark parameters as split over tensor
        # ranks. Without these marks the gradient norm counts the first rank's part alone.
        init_method=init,
        output_layer_init_method=init,
        embedding_init_method=init,
        use_cpu_initialization=not on_gpu,
        # Megatron's own fused SwiGLU, compiled: fewer activations are kept, read and written.
        bias_activation_fusion=on_gpu and model.activation == "swiglu",
        # Transformer Engine's products themselves add weight gradients to their fp32 buffers.
        gradient_accumulation_fusion=precision.backend == "te",
        # Fusions that need CUDA kernels of Apex.
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        deallocate_pipeline_outputs=False,
        batch_p2p_comm=False,
        deterministic_mode=precision.deterministic,
        # Megatron turns this into environment variables that forbid Transformer Engine other backends.
        attention_backend=AttnBackend.fused if precision.attention == "te" else AttnBackend.auto,
        **fp8,
    )


def _fp8_settings(precision: PrecisionConfig) -> dict[str, Any]:
    """Return Megatron's settings for an FP8 recipe: e4m3 forward, e5m2 backward."""
    return {
        "fp8": "hybrid",
        "fp8_recipe": precision.fp8,
        "fp8_amax_history_len": precision.fp8_amax_history,
        "fp8_amax_compute_algo": "max",
        "fp8_dot_product_attention": precision.fp8_attention,
        "fp8_param": precision.fp8_params,
        "first_last_layers_bf16": precision.bf16_first_layers + precision.bf16_last_layers > 0,
        "num_layers_at_start_in_bf16": precision.bf16_first_layers,
        "num_layers_at_end_in_bf16": precision.bf16_last_layers,
    }
