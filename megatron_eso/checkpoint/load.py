"""Load a checkpoint: a whole training state, or weights alone."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from megatron_eso.checkpoint.folder import CheckpointFolder
from megatron_eso.checkpoint.fp8_state import load_fp8_state
from megatron_eso.checkpoint.state import (
    EMA,
    MOMENTS,
    WEIGHTS,
    Place,
    places_of_training,
    places_of_weights,
    restore,
    sharded_places,
)
from megatron_eso.checkpoint.straight_reader import straight_reading
from megatron_eso.errors import CheckpointError
from megatron_eso.parallel.megatron_patches import quiet_megatron_import
from megatron_eso.parallel.moving_average import MovingAverage
from megatron_eso.parallel.optimizer import write_fp8_weights
from megatron_eso.parallel.parameters import shards

with quiet_megatron_import():
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.core import CheckpointingException


def load_training_state(
    folder: CheckpointFolder,
    chunks: list[nn.Module],
    optimizer: Any,
    average: MovingAverage | None,
    *,
    num_updates: int | None = None,
) -> int:
    """Load weights, moments and average; return the number of steps done.

    Args:
        folder: a whole checkpoint.
        chunks: wrapped model chunks.
        optimizer: Megatron's optimizer.
        average: moving average, if the run keeps one.
        num_updates: times the optimizer has stepped; None: as often as there were steps.
    """
    sidecar = folder.sidecar()
    step = int(sidecar["step"])
    kinds: tuple[str, ...] = (WEIGHTS, *MOMENTS)
    if average is not None and sidecar["has_ema"]:
        kinds = (*kinds, EMA)
    places = list(places_of_training(chunks, optimizer, average, kinds))
    _load(sharded_places(places), folder)
    updates = step if num_updates is None else num_updates
    restore([place for _, place in places], optimizer, average, step=updates)
    load_fp8_state(folder, chunks)
    write_fp8_weights(optimizer, chunks)
    return step


def load_weights(folder: CheckpointFolder, chunks: Iterable[nn.Module], *, use_ema: bool) -> str:
    """Load weights alone into model chunks; return which kind was loaded."""
    kind, places = _loaded_weights(folder, chunks, use_ema=use_ema)
    with torch.no_grad():
        for place in places:
            place.parameter.copy_(place.tensors[kind])
    return kind


def load_first_weights(
    folder: CheckpointFolder, chunks: list[nn.Module], optimizer: Any, average: MovingAverage | None
) -> str:
    """Load the weights that a run starts from; return which kind was loaded.

    The masters get them in float32, whatever the model's format, and the average starts there too.
    """
    kind, places = _loaded_weights(folder, chunks, use_ema=True)
    owned = shards(optimizer)
    first = [
        replace(place, tensors={WEIGHTS: place.tensors[kind]}, shard=owned.get(place.parameter))
        for place in places
    ]
    restore(first, optimizer, average, step=0)
    return kind


def _loaded_weights(
    folder: CheckpointFolder, chunks: Iterable[nn.Module], *, use_ema: bool
) -> tuple[str, list[Place]]:
    """Return which kind of weights a checkpoint gave, and for each parameter those loaded."""
    kind = EMA if use_ema and folder.sidecar()["has_ema"] else WEIGHTS
    places = list(places_of_weights(chunks, kind))
    _load(sharded_places(places), folder)
    return kind, [place for _, place in places]


def require_same_model(folder: CheckpointFolder, model: dict[str, Any]) -> None:
    """Raise if a checkpoint's architecture is not ``model``, naming every difference."""
    stored = folder.sidecar()["model"]
    ignored = {"dropout", "init_std", "max_length"}
    different = [
        f"model.{name}: checkpoint {stored.get(name)!r}, configuration {value!r}"
        for name, value in model.items()
        if name not in ignored and stored.get(name) != value
    ]
    if different:
        raise CheckpointError(
            f"checkpoint {folder.path} holds another model:\n  - " + "\n  - ".join(different)
        )


def _load(state: dict[str, ShardedTensor], folder: CheckpointFolder) -> None:
    """Fill the tensors of a sharded state."""
    wanted: dict[str, Any] = {key: entry.data for key, entry in state.items()}
    try:
        with straight_reading():
            loaded: Any = dist_checkpointing.load(state, str(folder.path))
    except (CheckpointingException, CheckpointException, OSError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint {folder.path} cannot be loaded: {error}") from error
    for key, tensor in wanted.items():
        if loaded[key].data_ptr() != tensor.data_ptr():
            tensor.copy_(loaded[key])
