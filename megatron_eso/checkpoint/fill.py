"""Fill this rank's tensors from a checkpoint's files.

Each rank reads for itself, by the checkpoint's index. Nothing is exchanged, so a rank that cannot read can
still tell the others. Nothing that a file names is run (torch_dist.py); Megatron's own loading would
unpickle what it finds.

Only the wanted rows of a stored part are read. Rows wanted whole, as at the layout that wrote them, go from
the file straight to their final memory; others go block by block. Where only some columns are wanted, as of
an output matrix at another tensor size, whole rows are still read.
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
BLOCK_BYTES = 64 << 20
"""How much a thread reads at a time when it needs a buffer; parts may have any size."""


@dataclass(frozen=True)
class _Read:
    """A stored part, and a tensor that wants some of it."""

    stored: StoredTensor
    chunk: Chunk
    target: Tensor
    """The tensor to fill; has the axes of the stored tensor."""
    offsets: tuple[int, ...]
    """Where the target begins in the stored tensor."""


def fill(reader: TorchDistReader, wanted: Iterable[ShardedTensor]) -> None:
    """Fill the data of sharded tensors.

    Raises:
        CheckpointError: if a tensor is missing, has another shape, or cannot be read.
    """
    reads = [read for entry in wanted for read in _reads_of(reader, entry)]
    with ThreadPoolExecutor(THREADS, "load") as pool:
        list(pool.map(lambda read: _perform(reader, read), reads))


def _reads_of(reader: TorchDistReader, entry: ShardedTensor) -> list[_Read]:
    """Return the reads that fill a sharded tensor."""
    stored, shape = reader.tensors.get(entry.key), tuple(entry.global_shape)
    if stored is None:
        raise CheckpointError(f"{reader.folder} does not hold the tensor {entry.key}")
    # Megatron allows this where a vocabulary is padded; the layout decides how many rows. They are zeros.
    may_differ = entry.allow_shape_mismatch and len(shape) == len(stored.shape)
    if stored.shape != shape and not may_differ:
        raise CheckpointError(
            f"{reader.folder} holds {entry.key} with shape {stored.shape}, but the model's is {shape}"
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
            f"{reader.folder}: the stored parts of {entry.key} do not make up the whole tensor; the "
            "checkpoint is damaged"
        )
    return reads


def _is_near(chunk: Chunk, offsets: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Return, from the first axis alone, whether a chunk may overlap a target.

    This is quick, and rules out the chunks of most layers.
    """
    if not shape:
        return True
    return (
        chunk.offsets[0] < offsets[0] + shape[0] and offsets[0] < chunk.offsets[0] + chunk.sizes[0]
    )


def _common(
    chunk: Chunk, offsets: tuple[int, ...], shape: tuple[int, ...]
) -> list[tuple[int, int]]:
    """Return, for each axis, begin and size of the overlap of a chunk and a target."""
    found = []
    for first, size, offset, length in zip(chunk.offsets, chunk.sizes, offsets, shape, strict=True):
        begin = max(first, offset)
        found.append((begin, max(min(first + size, offset + length) - begin, 0)))
    return found


def _perform(reader: TorchDistReader, read: _Read) -> None:
    """Copy the overlap of a stored part into the target."""
    part, first_byte = reader.mapped(read.stored, read.chunk)
    common = _common(read.chunk, read.offsets, read.target.shape)
    into = read.target[_within(common, read.offsets)]
    inside = _within(common, read.chunk.offsets)
    if not part.is_contiguous():  # transposed, say; this trainer writes no such part
        into.copy_(part[inside])
        return
    # The axes before this one have one entry each, so the wanted rows along it lie in one piece.
    axis = next((i for i, size in enumerate(into.shape) if size > 1), max(into.dim() - 1, 0))
    rows = part[inside[: axis + 1]]
    first_byte += rows.data_ptr() - part.data_ptr()
    _read_rows(
        reader.folder / read.chunk.file,
        first_byte,
        rows.view(-1, *rows.shape[axis + 1 :]),
        into.view(-1, *into.shape[axis + 1 :]),
        inside[axis + 1 :],
    )


def _within(common: list[tuple[int, int]], offsets: tuple[int, ...]) -> tuple[slice, ...]:
    """Return the overlap's slices within a tensor that begins at these offsets."""
    return tuple(slice(at - o, at - o + n) for (at, n), o in zip(common, offsets, strict=True))


def _read_rows(
    path: Path, first_byte: int, rows: Tensor, into: Tensor, columns: tuple[slice, ...]
) -> None:
    """Read rows that lie one after the other in a file, and copy the wanted columns of each.

    Args:
        path: the file.
        first_byte: where the first row begins.
        rows: the mapped rows, used only for shape and format: a mapped page that cannot be read would
            end the process.
        into: as many rows, with the wanted columns.
        columns: the wanted part of a row, by axis.
    """
    is_plain = into.device.type == "cpu" and into.is_contiguous() and into.dtype == rows.dtype
    if is_plain and into.shape == rows.shape:
        _read_into(path, first_byte, into)
        return
    row_bytes = rows[0].nbytes
    num_rows = max(BLOCK_BYTES // row_bytes, 1)
    block = torch.empty_like(rows[:num_rows])
    for first in range(0, len(rows), num_rows):
        target = into[first : first + num_rows]
        read = block[: len(target)]
        _read_into(path, first_byte + first * row_bytes, read)
        target.copy_(read[:, *columns])


def _read_into(path: Path, first_byte: int, target: Tensor) -> None:
    """Fill a contiguous CPU tensor with bytes from a file.

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
