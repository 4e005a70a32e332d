"""Fill this rank's tensors from a checkpoint's files.

Each rank reads for itself, by the checkpoint's index: nothing is exchanged, so a rank that cannot read can
still tell the others, and nothing that a file names is run (torch_dist.py). Megatron's own loading would
unpickle what it finds. A part that is wanted as it is stored, as on the layout that wrote it, goes from the
file straight into the memory where it stays.
"""

import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_eso.checkpoint.torch_dist import Chunk, StoredTensor, TorchDistReader
from megatron_eso.errors import CheckpointError
from megatron_eso.parallel.megatron_patches import importing_megatron

with importing_megatron():
    from megatron.core.dist_checkpointing import ShardedTensor

THREADS = 4


@dataclass(frozen=True)
class _Read:
    """A stored part, some of which is wanted in a tensor."""

    stored: StoredTensor
    chunk: Chunk
    target: Tensor
    """With the axes of the stored tensor."""
    offsets: tuple[int, ...]
    """Where the target begins in the stored tensor."""


def fill(reader: TorchDistReader, wanted: Iterable[ShardedTensor]) -> None:
    """Fill the data of sharded tensors.

    Raises:
        CheckpointError: if a tensor is not there, has another shape, or cannot be read.
    """
    reads = [read for entry in wanted for read in _reads_of(reader, entry)]
    with ThreadPoolExecutor(THREADS, "load") as pool:
        list(pool.map(lambda read: _perform(reader, read), reads))


def _reads_of(reader: TorchDistReader, entry: ShardedTensor) -> list[_Read]:
    """Return the parts that a sharded tensor is made of."""
    stored, shape = reader.tensors.get(entry.key), tuple(entry.global_shape)
    if stored is None:
        raise CheckpointError(f"{reader.folder} does not hold {entry.key}")
    # Megatron allows it where rows pad a vocabulary, more or fewer by the layout: those are zeros.
    may_differ = entry.allow_shape_mismatch and len(shape) == len(stored.shape)
    if stored.shape != shape and not may_differ:
        raise CheckpointError(
            f"{reader.folder} holds {entry.key} with the shape {stored.shape}; the model's is {shape}"
        )
    assert entry.data is not None
    target = entry.data.detach()[(None,) * entry.prepend_axis_num]
    offsets = tuple(entry.global_offset)
    if may_differ:
        target.zero_()
    ends = (
        min(o + n, limit) for o, n, limit in zip(offsets, target.shape, stored.shape, strict=True)
    )
    count = math.prod(max(end - o, 0) for o, end in zip(offsets, ends, strict=True))
    reads, found = [], 0
    for chunk in stored.chunks:
        if not _is_near(chunk, offsets, target.shape):
            continue
        num_common = math.prod(size for _, size in _common(chunk, offsets, target.shape))
        if num_common:
            reads.append(_Read(stored, chunk, target, offsets))
            found += num_common
    if found != count:
        raise CheckpointError(
            f"{reader.folder}: the stored parts of {entry.key} do not make the tensor; the checkpoint is "
            "damaged"
        )
    return reads


def _is_near(chunk: Chunk, offsets: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Return whether a chunk may have something in common with a target; of most layers none has."""
    for first, size, offset, length in zip(chunk.offsets, chunk.sizes, offsets, shape, strict=True):
        return first < offset + length and offset < first + size  # by the first axis alone
    return True


def _common(
    chunk: Chunk, offsets: tuple[int, ...], shape: tuple[int, ...]
) -> list[tuple[int, int]]:
    """Return, for each axis, where the part common to a chunk and a target begins, and its size."""
    found = []
    for first, size, offset, length in zip(chunk.offsets, chunk.sizes, offsets, shape, strict=True):
        begin = max(first, offset)
        found.append((begin, max(min(first + size, offset + length) - begin, 0)))
    return found


def _perform(reader: TorchDistReader, read: _Read) -> None:
    """Copy what a target and a stored part have in common."""
    chunk, target = read.chunk, read.target
    part, first_byte = reader.mapped(read.stored, chunk)
    common = _common(chunk, read.offsets, target.shape)
    place = tuple(
        slice(at - o, at - o + n) for (at, n), o in zip(common, read.offsets, strict=True)
    )
    inside = tuple(
        slice(at - o, at - o + n) for (at, n), o in zip(common, chunk.offsets, strict=True)
    )
    into = target[place]
    is_plain = into.device.type == "cpu" and into.is_contiguous() and into.dtype == part.dtype
    if part.is_contiguous():
        # Not through the mapping: a page that cannot be read there ends the process.
        whole = into if is_plain and into.shape == part.shape else torch.empty_like(part)
        _read_into(reader.folder / chunk.file, first_byte, whole)
        if whole is into:
            return
        part = whole
    into.copy_(part[inside])


def _read_into(path: Path, first_byte: int, target: Tensor) -> None:
    """Fill a contiguous tensor on the CPU with bytes of a file.

    Raises:
        CheckpointError: if they cannot be read.
    """
    memory: Any = target.view(-1).view(torch.uint8).numpy().data
    try:
        with open(path, "rb", buffering=0) as file:
            done = 0
            while done < len(memory):
                got = os.preadv(file.fileno(), (memory[done:],), first_byte + done)
                if not got:
                    raise CheckpointError(f"{path} ends before its tensors do")
                done += got
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
