"""Build this rank's model chunks from a run's configuration."""

import os
from dataclasses import replace

import torch

from megatron_eso.config.precision_rules import (
    FUSED_ATTENTION,
    Machine,
    broken,
    wants_te_attention,
)
from megatron_eso.config.precision_table import MACHINE_RULES
from megatron_eso.config.schema import RunConfig
from megatron_eso.model.eso_model import EsoModel
from megatron_eso.model.megatron_config import transformer_config
from megatron_eso.parallel.groups import Layout
from megatron_eso.parallel.megatron_patches import importing_megatron

with importing_megatron():
    from megatron.core.transformer.transformer_config import TransformerConfig


def build_chunks(
    config: RunConfig, layout: Layout, device: torch.device
) -> tuple[list[EsoModel], TransformerConfig]:
    """Return this rank's model chunks, with weights not set yet, and Megatron's configuration.

    Args:
        config: run with resolved precision (no auto).
        layout: this rank's place.
        device: where the weights live.
    """
    if not wants_te_attention(config):
        for name in FUSED_ATTENTION:  # Megatron refuses values that its own setting does not imply
            os.environ.pop(name, None)
    on_gpu = device.type == "cuda"
    settings = transformer_config(config.model, config.parallel, config.precision, on_gpu=on_gpu)
    num_chunks = config.parallel.virtual_pipeline
    chunks = []
    for index in range(num_chunks):
        chunk = EsoModel(
            settings,
            config.model,
            attention=config.precision.attention,
            backend=config.precision.backend,
            pre_process=layout.is_first_stage and index == 0,
            post_process=layout.is_last_stage and index == num_chunks - 1,
            vp_stage=index if num_chunks > 1 else None,
        )
        chunks.append(chunk.to(device))
    return chunks, settings


def resolve_precision(config: RunConfig, dtype: str, machine: Machine | None = None) -> RunConfig:
    """Return the configuration with ``precision.dtype`` and the other auto choices made.

    Args:
        config: the run.
        dtype: fp32 or bf16.
        machine: what a rank runs on; None: nothing that Transformer Engine can use.
    """
    precision = replace(
        config.precision,
        dtype=dtype,
        backend=_backend(config, dtype, machine),
        attention=_attention(config),
    )
    return replace(config, precision=precision)


def _backend(config: RunConfig, dtype: str, machine: Machine | None) -> str:
    """Return the backend asked for; for ``auto``, ``te`` where it works and ``torch`` elsewhere.

    Transformer Engine multiplies fp32 matrices in TF32, with 10 bits of mantissa, whatever PyTorch's
    switches say (gemm/cublaslt_gemm.cu: CUBLAS_COMPUTE_32F_FAST_TF32). So fp32 takes it only if asked.
    """
    asked = config.precision.backend
    if asked != "auto":
        return asked
    if machine is None or dtype == "fp32":
        return "torch"
    with_te = replace(config, precision=replace(config.precision, backend="te"))
    return "torch" if broken(MACHINE_RULES, with_te, machine) else "te"


def _attention(config: RunConfig) -> str:
    if config.precision.attention != "auto":
        return config.precision.attention
    return "te" if config.precision.fp8_attention else "split"
