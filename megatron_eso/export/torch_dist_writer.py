"""Write a torch_dist checkpoint tensor by tensor, without Megatron or a process group.

One tensor of one layer is in memory at a time. The files are those of Megatron's own saving: one
``.distcp`` of small torch files, the index ``.metadata``, ``common.pt`` and ``metadata.json``. Megatron
loads them at any layout.
"""

import io
import json
import pickle
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

_FILE = "__0_0.distcp"


class TorchDistWriter:
    """A checkpoint being written into an existing folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = open(folder / _FILE, "wb")
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}

    def __enter__(self) -> "TorchDistWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if kind is None:
            self._finish()

    def write(self, name: str, tensor: Tensor, *, layer: int | None, num_layers: int) -> None:
        """Add a tensor, or one layer of a stacked one."""
        part = tensor if layer is None else tensor.unsqueeze(0)
        shape = part.shape if layer is None else torch.Size((num_layers, *tensor.shape))
        offset = torch.Size((layer or 0, *[0] * (part.dim() - 1)))
        chunk = ChunkStorageMetadata(offsets=offset, sizes=part.shape)
        known = self._tensors.setdefault(
            name,
            TensorStorageMetadata(TensorProperties(dtype=part.dtype), size=shape, chunks=[]),
        )
        known.chunks.append(chunk)
        first = self._file.tell()
        # A view would be saved with its whole storage; a clone holds only these numbers.
        alone = part if part.untyped_storage().nbytes() == part.nbytes else part.clone()
        torch.save(alone, _Plain(self._file))  # type: ignore[arg-type]
        index = MetadataIndex(name, offset)
        self._places[index] = _StorageInfo(_FILE, first, self._file.tell() - first)

    def _finish(self) -> None:
        index = Metadata(state_dict_metadata=dict(self._tensors), storage_data=self._places)
        with open(self._folder / ".metadata", "wb") as file:
            pickle.dump(index, file)
        torch.save({}, self._folder / "common.pt")
        content = {
            "sharded_backend": "torch_dist",
            "sharded_backend_version": 1,
            "common_backend": "torch",
            "common_backend_version": 1,
        }
        (self._folder / "metadata.json").write_text(json.dumps(content))


class _Plain(io.RawIOBase):
    """The end of a file, as a file of its own: torch's zip writer must start at position 0."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self._file = file

    def write(self, data: object) -> int:
        """Append."""
        return self._file.write(data)  # type: ignore[arg-type]

    def writable(self) -> bool:
        """Return True."""
        return True
