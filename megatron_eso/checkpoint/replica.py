"""Build a model from nothing but a checkpoint, at any layout, for evaluation and sampling."""

from dataclasses import replace

from omegaconf import OmegaConf

from megatron_eso.checkpoint.folder import CheckpointFolder
from megatron_eso.checkpoint.load import load_weights
from megatron_eso.config.schema import ModelConfig, ObjectiveConfig, ParallelConfig, RunConfig
from megatron_eso.model.build import build_chunks
from megatron_eso.model.replica import Replica
from megatron_eso.parallel.device import Device
from megatron_eso.parallel.groups import Layout


def run_config_of(folder: CheckpointFolder, parallel: ParallelConfig) -> RunConfig:
    """Return a run configuration with the checkpoint's model and objective, and the given layout."""
    sidecar = folder.sidecar()
    config = RunConfig()
    return replace(
        config,
        model=_section(ModelConfig, sidecar["model"]),
        objective=_section(ObjectiveConfig, sidecar["objective"]),
        train=replace(config.train, sequence_length=sidecar["sequence_length"], steps=1),
        parallel=parallel,
    )


def load_replica(
    folder: CheckpointFolder, config: RunConfig, layout: Layout, device: Device, *, use_ema: bool
) -> tuple[Replica, str]:
    """Return a model with the checkpoint's weights, and their kind (weights or ema)."""
    chunks, _ = build_chunks(config, layout, device.torch_device)
    kind = load_weights(folder, chunks, use_ema=use_ema)
    for chunk in chunks:
        chunk.eval()
    return Replica(config, layout, device.torch_device, list(chunks)), kind


def _section(schema: type, values: dict) -> object:
    """Return a section of the configuration from stored values; an unknown key is an error."""
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
