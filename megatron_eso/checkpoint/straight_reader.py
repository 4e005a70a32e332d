"""Reads the tensors of a torch_dist checkpoint straight into the memory where they will stay.

PyTorch's reader makes each stored tensor in memory of its own and copies it to where it belongs:
twice the copies, and page faults that cost more. A tensor that is wanted whole, as on the layout that
wrote it, is one positioned read here, several at a time; all others take PyTorch's way.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.planner import LoadItemType
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_eso.errors import CheckpointError
from megatron_eso.parallel.megatron_patches import importing_megatron, with_reader_of_folders

with importing_megatron():
    from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import (
        CachedMetadataFileSystemReader,
    )

THREADS = 4


@dataclass(frozen=True)
class _Read:
    """Bytes of a file that go into a tensor."""

    path: Path
    first_byte: int
    target: Tensor


class StraightReader(CachedMetadataFileSystemReader):
    """PyTorch's reader of checkpoint folders, with a quick way for tensors that are wanted whole."""

    def read_data(self, plan: Any, planner: Any) -> Any:
        """Read what a plan asks for."""
        left, reads = [], []
        for item in plan.items:
            target = self._straight_target(item, planner)
            read = None if target is None else self._read_of(item, target)
            if read is None:
                left.append(item)
            else:
                reads.append(read)
        with ThreadPoolExecutor(THREADS, "load") as pool:
            list(pool.map(_perform, reads))
        return super().read_data(replace(plan, items=left), planner)

    def _straight_target(self, item: Any, planner: Any) -> Tensor | None:
        """Return the tensor that an item fills, if its memory can take the file's bytes."""
        if item.type == LoadItemType.BYTE_IO or any(item.storage_offsets):
            return None
        if self.storage_data[item.storage_index].transform_descriptors:
            return None  # compressed
        target = planner.resolve_tensor(item).detach()
        is_plain = target.device.type == "cpu" and target.is_contiguous()
        return target if is_plain and target.numel() else None

    def _read_of(self, item: Any, target: Tensor) -> _Read | None:
        """Return where the bytes of an item are, if the stored tensor is as the target is."""
        place = self.storage_data[item.storage_index]
        path = Path(self.path) / place.relative_path
        with open(path, "rb") as file, torch.serialization.skip_data():
            part: Any = _create_file_view(file, place.offset, place.length)
            stored = torch.load(part, map_location="cpu", weights_only=True)
            part.seek(0)
            archive: Any = torch._C.PyTorchFileReader(part)
            records = [name for name in archive.get_all_records() if name.startswith("data/")]
            first = place.offset + archive.get_record_offset(records[0])
        is_same = (
            len(records) == 1
            and stored.is_contiguous()
            and (stored.shape, stored.dtype) == (target.shape, target.dtype)
            and stored.untyped_storage().nbytes() == target.nbytes
        )
        return _Read(path, first, target) if is_same else None


def straight_reading() -> AbstractContextManager[None]:
    """Have Megatron load with :class:`StraightReader`."""
    return with_reader_of_folders(StraightReader)


def _perform(read: _Read) -> None:
    memory: Any = read.target.view(-1).view(torch.uint8).numpy().data
    descriptor, done = os.open(read.path, os.O_RDONLY), 0
    try:
        while done < len(memory):
            got = os.preadv(descriptor, (memory[done:],), read.first_byte + done)
            if not got:
                raise CheckpointError(f"{read.path} ends before its tensors do")
            done += got
    finally:
        os.close(descriptor)
