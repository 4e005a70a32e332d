"""Load a checkpoint: a whole training state, or only weights.

Every rank reads for itself (fill.py) and says what it could not read before any rank goes on. A rank that
raised alone would leave the others waiting in the next exchange.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_eso.checkpoint.fill import fill
from megatron_eso.checkpoint.folder import CheckpointFolder
from megatron_eso.checkpoint.fp8_state import load_fp8_state
from megatron_eso.checkpoint.places import (
    Place,
    places_of_training,
    places_of_weights,
    places_to_share,
    restore,
    sharded_places,
    shared,
)
from megatron_eso.checkpoint.state import EMA, MOMENTS, WEIGHTS
from megatron_eso.checkpoint.torch_dist import TorchDistReader
from megatron_eso.config.derive import with_sizes
from megatron_eso.config.schema import ModelConfig
from megatron_eso.errors import CheckpointError
from megatron_eso.parallel.exchange import from_first_rank, together
from megatron_eso.parallel.moving_average import MovingAverage
from megatron_eso.parallel.optimizer import write_fp8_weights
from megatron_eso.parallel.parameters import dealt_parameters, device_of


def load_training_state(
    folder: CheckpointFolder,
    facts: Mapping[str, Any],
    chunks: list[nn.Module],
    optimizer: Any,
    average: MovingAverage | None,
    group: dist.ProcessGroup,
    *,
    num_updates: int | None = None,
) -> int:
    """Load weights, moments and average; return the number of steps done.

    Args:
        folder: a whole checkpoint.
        facts: what it says of itself (``folder.sidecar()``).
        chunks: wrapped model chunks.
        optimizer: Megatron's optimizer.
        average: moving average, if the run keeps one.
        group: data-parallel group, whose ranks share the reading; all ranks must call.
        num_updates: number of updates the optimizer has made; None: one per step.
    """
    device = device_of(chunks)
    reader = _opened(folder, device)
    step = int(facts["step"])
    kinds: tuple[str, ...] = (WEIGHTS, *MOMENTS)
    if average is not None and facts["has_ema"]:
        kinds = (*kinds, EMA)
    places = _loaded(reader, chunks, optimizer, average, kinds, group)
    updates = step if num_updates is None else num_updates
    restore(places, optimizer, average, step=updates)
    load_fp8_state(reader, chunks, device)
    write_fp8_weights(optimizer, chunks)
    return step


def _loaded(
    reader: TorchDistReader,
    chunks: list[nn.Module],
    optimizer: Any,
    average: MovingAverage | None,
    kinds: tuple[str, ...],
    group: dist.ProcessGroup,
) -> Iterator[Place]:
    """Return the places of all parameters, with tensors of these kinds loaded from the checkpoint."""
    if group.size() == 1:
        places = list(places_of_training(chunks, optimizer, average, kinds))
        _load(places, reader, device_of(chunks))
        return (place for _, place in places)
    dealt = dealt_parameters(chunks, group.size())
    places = list(places_to_share(dealt, kinds, group.rank()))
    _load(places, reader, device_of(chunks))
    return shared(dealt, optimizer, [place for _, place in places], kinds, group)


def load_weights(folder: CheckpointFolder, chunks: Sequence[nn.Module], *, use_ema: bool) -> str:
    """Load only weights into model chunks; return which kind was loaded. All ranks must call this."""
    device = device_of(chunks)
    kind = _kind(folder, device, use_ema=use_ema)
    places = list(places_of_weights(chunks, kind))
    _load(places, _opened(folder, device), device)
    with torch.no_grad():
        for _, place in places:
            place.parameter.copy_(place.tensors[kind])
    return kind


def load_first_weights(
    folder: CheckpointFolder,
    chunks: list[nn.Module],
    optimizer: Any,
    average: MovingAverage | None,
    group: dist.ProcessGroup,
) -> str:
    """Load the weights that a run starts from; return which kind was loaded.

    The masters get them in float32, whatever the model's number format; the average starts from them too.
    """
    device = device_of(chunks)
    kind = _kind(folder, device, use_ema=True)
    places = _loaded(_opened(folder, device), chunks, optimizer, average, (kind,), group)
    first = (replace(place, tensors={WEIGHTS: place.tensors[kind]}) for place in places)
    restore(first, optimizer, average, step=0)
    return kind


def _kind(folder: CheckpointFolder, device: torch.device, *, use_ema: bool) -> str:
    """Return which kind of weights to load from a checkpoint."""
    has_ema = from_first_rank(folder.sidecar, device)["has_ema"]
    return EMA if use_ema and has_ema else WEIGHTS


def require_same_model(path: Path, sidecar: dict[str, Any], model: ModelConfig) -> None:
    """Raise if a checkpoint's architecture is not ``model``, naming every difference."""
    names = {entry.name for entry in fields(ModelConfig)}
    known = {name: value for name, value in sidecar["model"].items() if name in names}
    # A size left to be derived from others means the same model as that size given explicitly.
    stored, asked = asdict(with_sizes(ModelConfig(**known))), asdict(with_sizes(model))
    ignored = {"dropout", "init_std", "max_length"}
    different = [
        f"model.{name}: checkpoint {stored[name]!r}, configuration {value!r}"
        for name, value in asked.items()
        if name not in ignored and stored[name] != value
    ]
    if different:
        raise CheckpointError(
            f"checkpoint {path} holds another model:\n  - " + "\n  - ".join(different)
        )


def _opened(folder: CheckpointFolder, device: torch.device) -> TorchDistReader:
    return together(lambda: TorchDistReader(folder.path), device, CheckpointError)


def _load(places: list[tuple[Any, Place]], reader: TorchDistReader, device: torch.device) -> None:
    """Fill the tensors of this rank's places, if any. All ranks must call this."""
    wanted = sharded_places(places)
    together(lambda: fill(reader, wanted), device, CheckpointError)
