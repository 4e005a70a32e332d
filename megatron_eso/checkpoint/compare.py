"""Compare two checkpoints tensor by tensor, whatever layouts wrote them; one process, no ranks.

Stored tensors have layout-free names and global shapes, so they are read whole, a few at a time.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from megatron_eso.checkpoint.folder import CheckpointFolder
from megatron_eso.errors import CheckpointError

_BATCH_BYTES = 1 << 30  # read from each checkpoint at once


@dataclass(frozen=True)
class Difference:
    """How far one group of tensors is apart."""

    group: str
    """weights, exp_avg, exp_avg_sq or ema."""
    num_tensors: int
    largest: float
    """Largest absolute difference; 0 also where only signs of zero differ. inf: nan on one side."""
    where: str
    """Name of the tensor with the largest difference; empty if there is none."""
    is_bitwise_equal: bool


def tensors_of(folder: CheckpointFolder) -> dict[str, TensorStorageMetadata]:
    """Return what is stored: name -> shape and format, without reading a value."""
    metadata = FileSystemReader(str(folder.path)).read_metadata().state_dict_metadata
    return {n: m for n, m in sorted(metadata.items()) if isinstance(m, TensorStorageMetadata)}


def compare(first: CheckpointFolder, second: CheckpointFolder) -> list[Difference]:
    """Return the differences by group.

    Raises:
        CheckpointError: if the two hold tensors of other names or shapes.
    """
    mine, theirs = tensors_of(first), tensors_of(second)
    _require_same_tensors(first.path, second.path, mine, theirs)
    found: dict[str, Difference] = {}
    for names in _batches(mine):
        ours, others = _read(first, mine, names), _read(second, theirs, names)
        for name in names:
            group = name.partition(".")[0]
            here = _difference(group, name, ours[name], others[name])
            found[group] = _joined(found[group], here) if group in found else here
    return list(found.values())


def _require_same_tensors(
    first: Path, second: Path, mine: dict[str, Any], theirs: dict[str, Any]
) -> None:
    wrong = [f"{name} is only in {first}" for name in mine.keys() - theirs.keys()]
    wrong += [f"{name} is only in {second}" for name in theirs.keys() - mine.keys()]
    wrong += [
        f"{name}: {tuple(mine[name].size)} and {tuple(theirs[name].size)}"
        for name in mine.keys() & theirs.keys()
        if mine[name].size != theirs[name].size
    ]
    if wrong:
        raise CheckpointError(
            f"{first} and {second} hold different models:\n  - " + "\n  - ".join(sorted(wrong))
        )


def _batches(tensors: dict[str, TensorStorageMetadata]) -> Iterator[list[str]]:
    names, size = [], 0
    for name, metadata in tensors.items():
        number = 4 * metadata.size.numel()
        if names and size + number > _BATCH_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += number
    if names:
        yield names


def _read(
    folder: CheckpointFolder, tensors: dict[str, TensorStorageMetadata], names: list[str]
) -> dict[str, Any]:
    state: dict[str, Any] = {
        name: torch.empty(tensors[name].size, dtype=tensors[name].properties.dtype)
        for name in names
    }
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*assuming the intent is to load in a single process.*"
        )
        load(state, storage_reader=FileSystemReader(str(folder.path)), no_dist=True)
    return state


def _difference(group: str, name: str, a: torch.Tensor, b: torch.Tensor) -> Difference:
    is_equal = a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b))
    largest = 0.0
    if not is_equal and a.numel():
        largest = float(torch.nan_to_num((a.double() - b.double()).abs(), nan=torch.inf).max())
    return Difference(group, 1, largest, "" if is_equal else name, is_equal)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _joined(a: Difference, b: Difference) -> Difference:
    worse = b if (b.largest, not b.is_bitwise_equal) > (a.largest, not a.is_bitwise_equal) else a
    return Difference(
        a.group,
        a.num_tensors + b.num_tensors,
        worse.largest,
        worse.where,
        a.is_bitwise_equal and b.is_bitwise_equal,
    )
