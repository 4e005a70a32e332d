"""Compare two checkpoints tensor by tensor, whatever layouts wrote them, in one process without ranks.

Stored tensors have layout-free names and global shapes, so they are read whole, one at a time. Nothing that
a foreign checkpoint's pickles may name is run (torch_dist.py).
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_eso.checkpoint.folder import CheckpointFolder
from megatron_eso.checkpoint.torch_dist import StoredTensor, TorchDistReader, read_index
from megatron_eso.errors import CheckpointError


@dataclass(frozen=True)
class Difference:
    """How much one group of tensors differs."""

    group: str
    """weights, exp_avg, exp_avg_sq or ema."""
    num_tensors: int
    largest: float
    """Largest absolute difference; 0 also if only signs of zeros differ. inf: a nan was compared."""
    where: str
    """Name of the tensor with the largest difference; empty if there is none."""
    is_bitwise_equal: bool


def tensors_of(folder: CheckpointFolder) -> dict[str, StoredTensor]:
    """Return name -> shape and format of every stored tensor, without reading a value.

    Raises:
        CheckpointError: if the index is missing, damaged, or names anything that an index does not need.
    """
    return dict(sorted(read_index(folder.path).items()))


def compare(first: CheckpointFolder, second: CheckpointFolder) -> list[Difference]:
    """Return the differences by group.

    Raises:
        CheckpointError: if names or shapes of their tensors differ.
    """
    mine, theirs = TorchDistReader(first.path), TorchDistReader(second.path)
    _require_same_tensors(first.path, second.path, mine.tensors, theirs.tensors)
    found: dict[str, Difference] = {}
    for name in sorted(mine.tensors):
        group = name.partition(".")[0]
        here = _difference(group, name, mine.read(name), theirs.read(name))
        found[group] = _joined(found[group], here) if group in found else here
    return list(found.values())


def _require_same_tensors(
    first: Path, second: Path, mine: dict[str, StoredTensor], theirs: dict[str, StoredTensor]
) -> None:
    wrong = [f"{name} is only in {first}" for name in mine.keys() - theirs.keys()]
    wrong += [f"{name} is only in {second}" for name in theirs.keys() - mine.keys()]
    wrong += [
        f"{name}: {mine[name].shape} and {theirs[name].shape}"
        for name in mine.keys() & theirs.keys()
        if mine[name].shape != theirs[name].shape
    ]
    if wrong:
        raise CheckpointError(
            f"{first} and {second} hold different models:\n  - " + "\n  - ".join(sorted(wrong))
        )


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
