"""Build this rank's model chunks from a run's configuration."""

from dataclasses import replace

import torch

from megatron_eso.config.schema import RunConfig
from megatron_eso.model.eso_model import EsoModel
from megatron_eso.model.megatron_config import transformer_config
from megatron_eso.parallel.groups import Layout
from megatron_eso.parallel.megatron_patches import quiet_megatron_import

with quiet_megatron_import():
    from megatron.core.transformer.transformer_config import TransformerConfig


def build_chunks(
    config: RunConfig, layout: Layout, device: torch.device
) -> tuple[list[EsoModel], TransformerConfig]:
    """Return the model chunks of this rank, weights not set yet, and Megatron's configuration.

    Args:
        config: run with resolved precision (no auto).
        layout: this rank's place.
        device: where the weights live.
    """
    on_gpu = device.type == "cuda"
    settings = transformer_config(config.model, config.parallel, config.precision, on_gpu=on_gpu)
    num_chunks = config.parallel.virtual_pipeline
    chunks = []
    for index in range(num_chunks):
        chunk = EsoModel(
            settings,
            config.model,
            attention=config.precision.attention,
            pre_process=layout.is_first_stage and index == 0,
            post_process=layout.is_last_stage and index == num_chunks - 1,
            vp_stage=index if num_chunks > 1 else None,
        )
        chunks.append(chunk.to(device))
    return chunks, settings


def resolve_precision(config: RunConfig, dtype: str) -> RunConfig:
    """Return the configuration with ``precision.dtype`` and the other auto choices made."""
    precision = replace(
        config.precision,
        dtype=dtype,
        backend="torch" if config.precision.backend == "auto" else config.precision.backend,
        attention="split" if config.precision.attention == "auto" else config.precision.attention,
    )
    return replace(config, precision=precision)
