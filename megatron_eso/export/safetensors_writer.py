"""Write safetensors shards tensor by tensor, so that memory use does not grow with the model.

The header comes first and gives every tensor's place, so all shapes must be known before the first tensor
is written. The tensors then follow in that order.
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from megatron_eso.errors import CheckpointError

SHARD_BYTES = 5_000_000_000  # transformers 5 would write 50 GB shards
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


@dataclass(frozen=True)
class Spec:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Number of bytes of its data."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


class SafetensorsWriter:
    """Shards of one model; tensors are written in the order of the specs."""

    def __init__(self, folder: Path, specs: list[Spec], shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._shards = plan_shards(specs, shard_bytes)
        self._queue = [(i, spec) for i, shard in enumerate(self._shards) for spec in shard]
        self._at, self._open, self._file = 0, -1, None

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
        if kind is None:
            self._finish()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor, in the spec's dtype.

        Raises:
            CheckpointError: if another tensor is next, or the shape differs.
        """
        if self._at >= len(self._queue):
            raise CheckpointError(f"{name} is one tensor too many")
        shard, spec = self._queue[self._at]
        if (spec.name, spec.shape) != (name, tuple(tensor.shape)):
            raise CheckpointError(
                f"{spec.name} {spec.shape} was to be written next, not {name} {tuple(tensor.shape)}"
            )
        if shard != self._open:
            self._start(shard)
        data = tensor.to(spec.dtype).contiguous().reshape(-1)
        assert self._file is not None
        if data.numel():
            self._file.write(memoryview(data.view(torch.uint8).numpy().data))
        self._at += 1

    def _start(self, shard: int) -> None:
        if self._file is not None:
            self._file.close()
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for spec in self._shards[shard]:
            places = [at, at + spec.num_bytes]
            header[spec.name] = {
                "dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": places
            }  # fmt: skip
            at = places[1]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = open(self._folder / self._name(shard), "wb")
        self._file.write(struct.pack("<Q", len(text)) + text)
        self._open = shard

    def _name(self, shard: int) -> str:
        count = len(self._shards)
        return (
            "model.safetensors"
            if count == 1
            else f"model-{shard + 1:05d}-of-{count:05d}.safetensors"
        )

    def _finish(self) -> None:
        if self._at != len(self._queue):
            raise CheckpointError(f"{self._queue[self._at][1].name} was never written")
        if len(self._shards) > 1:
            where = {spec.name: self._name(shard) for shard, spec in self._queue}
            total = sum(spec.num_bytes for _, spec in self._queue)
            content = {"metadata": {"total_size": total}, "weight_map": where}
            (self._folder / "model.safetensors.index.json").write_text(
                json.dumps(content, indent=1)
            )


def plan_shards(specs: list[Spec], shard_bytes: int) -> list[list[Spec]]:
    """Return the specs grouped into shards of at most ``shard_bytes``, or of one larger tensor."""
    shards: list[list[Spec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.num_bytes
    return shards
