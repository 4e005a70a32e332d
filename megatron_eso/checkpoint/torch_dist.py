"""Read a sharded torch_dist checkpoint piece by piece, without Megatron or a process group.

``.metadata`` is a pickle that says which byte range of which ``.distcp`` file holds which part of which
tensor. Every such range is a small torch file of its own. Both are read without running anything: only
the names below are known, each means a stand-in that keeps its content, and any other name is refused.
"""

import io
import mmap
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_eso.checkpoint.inert_pickle import STORAGE_DTYPES, Inert
from megatron_eso.errors import CheckpointError

_METADATA = "torch.distributed.checkpoint.metadata"
_KNOWN = {
    (_METADATA, name)
    for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties",
        "_MEM_FORMAT_ENCODING", "ChunkStorageMetadata", "MetadataIndex", "StorageMeta",
    )
} | {
    ("torch.distributed.checkpoint.planner", name)
    for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),  # from a run's third save on
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("torch", "memory_format"),
    ("pathlib", "PosixPath"),
}  # fmt: skip
_DTYPES = {
    "float64": torch.float64, "float32": torch.float32, "float16": torch.float16,
    "bfloat16": torch.bfloat16, "int64": torch.int64, "int32": torch.int32, "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8, "bool": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Chunk:
    """A rectangular part of a tensor and where its bytes are."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    first_byte: int
    num_bytes: int


@dataclass(frozen=True)
class StoredObject:
    """An object stored besides the tensors, and where its bytes are."""

    name: str
    file: str
    first_byte: int
    num_bytes: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the checkpoint; if layers are stacked, their number comes first in ``shape``."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


class TorchDistReader:
    """The tensors and objects of one checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors, self.objects = _read_index(folder)

    def read(self, name: str, layer: int | None = None) -> Tensor:
        """Return one tensor, or one layer of a stacked one.

        Raises:
            CheckpointError: if parts are missing, overlap, or are damaged.
        """
        stored = self.tensors[name]
        shape = stored.shape if layer is None else stored.shape[1:]
        chunks = [c for c in stored.chunks if layer is None or c.offsets[0] == layer]
        self._require_whole(stored, chunks, layer)
        if len(chunks) == 1:
            return self.mapped(stored, chunks[0])[0].reshape(shape)
        whole = torch.empty((1, *shape) if layer is not None else shape, dtype=stored.dtype)
        for chunk in chunks:
            offsets = chunk.offsets if layer is None else (0, *chunk.offsets[1:])
            place = tuple(slice(o, o + n) for o, n in zip(offsets, chunk.sizes, strict=True))
            whole[place] = self.mapped(stored, chunk)[0]
        return whole.reshape(shape)

    def read_object(self, name: str) -> Tensor:
        """Return an object's tensor; the objects written are a tensor, or a list of one.

        Raises:
            CheckpointError: if the object is anything else, or damaged.
        """
        stored = self.objects[name]
        found, _ = self._content(name, stored)
        if isinstance(found, list) and len(found) == 1:  # as Megatron writes it
            (found,) = found
        if not isinstance(found, Tensor):
            raise CheckpointError(f"{self.folder / stored.file}: {name} holds no tensor")
        return found

    def _require_whole(self, stored: StoredTensor, chunks: list[Chunk], layer: int | None) -> None:
        """Refuse parts that leave gaps, overlap, or extend beyond the tensor."""
        shape = stored.shape if layer is None else (1, *stored.shape[1:])
        starts = [c.offsets if layer is None else (0, *c.offsets[1:]) for c in chunks]
        inside = all(
            0 <= o and n > 0 and o + n <= limit
            for chunk, start in zip(chunks, starts, strict=True)
            for o, n, limit in zip(start, chunk.sizes, shape, strict=True)
        )
        count = sum(_count(chunk.sizes) for chunk in chunks)
        if not inside or count != _count(shape) or _overlap(starts, chunks):
            where = "" if layer is None else f", layer {layer},"
            raise CheckpointError(
                f"{self.folder}: the {len(chunks)} stored parts of {stored.name}{where} do not make the "
                f"tensor of shape {tuple(shape)}; the checkpoint is damaged"
            )

    def mapped(self, stored: StoredTensor, chunk: Chunk) -> tuple[Tensor, int]:
        """Return a part of a tensor, mapped but not yet read, and the byte of its file where it begins."""
        found, file_begin = self._content(stored.name, chunk)
        path = self.folder / chunk.file
        if not isinstance(found, Tensor):
            raise CheckpointError(f"{path}, {stored.name}: it holds no tensor")
        if found.dtype != stored.dtype or found.shape != torch.Size(chunk.sizes):
            raise CheckpointError(
                f"{path}: a part of {stored.name} is {found.dtype} {tuple(found.shape)}, not "
                f"{stored.dtype} {chunk.sizes}"
            )
        return found, found.data_ptr() - file_begin

    def _content(self, name: str, place: Chunk | StoredObject) -> tuple[Any, int]:
        """Return a byte range's content, mapped, and the address that the file's first byte would have."""
        path = self.folder / place.file
        try:
            with open(path, "rb") as file:
                size, end = file.seek(0, 2), place.first_byte + place.num_bytes
                if place.first_byte < 0 or end > size:
                    raise CheckpointError(
                        f"the file has {size} bytes, but this ends at {end}: the checkpoint is incomplete"
                    )
                return _content_of_range(file, place.first_byte, place.num_bytes)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
        except CheckpointError as error:
            raise CheckpointError(f"{path}, {name}: {error}") from None
        except Exception as error:  # a damaged zip or pickle may fail in any way
            raise CheckpointError(f"{path}: {name} cannot be read: {error}") from None


def read_index(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors that ``.metadata`` describes.

    Raises:
        CheckpointError: if the index is missing, damaged, or names anything that an index does not need.
    """
    return _read_index(folder)[0]


def _read_index(folder: Path) -> tuple[dict[str, StoredTensor], dict[str, StoredObject]]:
    """Return the tensors and objects that ``.metadata`` describes."""
    path = folder / ".metadata"
    try:
        with open(path, "rb") as file:
            content = _IndexUnpickler(file).load()
        described, places = content.state["state_dict_metadata"], content.state["storage_data"]
        where, objects = {}, {}
        for key, value in places.items():
            name, offset = key.state["fqn"], key.state.get("offset")
            if offset is not None:
                where[(name, _sizes(offset))] = value
            elif name in described and described[name].origin.endswith(".BytesStorageMetadata"):
                objects[name] = StoredObject(name, *_place(name, value))
        tensors = {
            name: _stored(name, entry.state, where)
            for name, entry in described.items()
            if entry.origin.endswith(".TensorStorageMetadata")
        }
        return tensors, objects
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): it is not a whole torch_dist checkpoint"
        ) from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # a pickle may fail in any way
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def _stored(name: str, entry: dict[str, Any], where: dict[Any, Any]) -> StoredTensor:
    chunks, shape = [], _sizes(entry["size"])
    for chunk in entry["chunks"]:
        offsets, sizes = _sizes(chunk.state["offsets"]), _sizes(chunk.state["sizes"])
        if not len(offsets) == len(sizes) == len(shape):
            raise CheckpointError(
                f"{name} has {len(shape)} dimensions, but its part at {offsets} has {len(sizes)}"
            )
        chunks.append(Chunk(offsets, sizes, *_place(name, where[(name, offsets)])))
    dtype = _dtype_of(entry["properties"])
    return StoredTensor(name, shape, dtype, tuple(chunks))


def _place(name: str, info: Inert) -> tuple[str, int, int]:
    """Return the file, first byte and number of bytes of what is stored under a name."""
    place = info.state
    if place.get("transform_descriptors"):
        raise CheckpointError(f"{name} is stored compressed, which is not read")
    file = str(place["relative_path"])
    if Path(file).name != file:
        raise CheckpointError(f"{name} points to {file!r}, outside the checkpoint's folder")
    return file, int(place["offset"]), int(place["length"])


def _dtype_of(properties: Inert) -> torch.dtype:
    """Return the dtype of TensorProperties: by name, or the first field of a state that is a tuple."""
    state = properties.state
    dtype = state.get("dtype") if isinstance(state, dict) else state[0]
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"a tensor has an unreadable dtype {dtype!r}")
    return dtype


def _sizes(size: Any) -> tuple[int, ...]:
    """Return the numbers of a torch.Size, which was read as a stand-in that holds one tuple."""
    values = size.args[0] if isinstance(size, Inert) and size.args else size
    return tuple(int(value) for value in (() if isinstance(values, Inert) else values))


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _overlap(starts: list[tuple[int, ...]], chunks: list[Chunk]) -> bool:
    boxes = [(s, c.sizes) for s, c in zip(starts, chunks, strict=True)]
    return any(
        all(a < b + m and b < a + n for a, n, b, m in zip(first, size, second, other, strict=True))
        for i, (first, size) in enumerate(boxes)
        for second, other in boxes[:i]
    )


class _IndexUnpickler(pickle.Unpickler):
    """Reads an index's classes as stand-ins; imports and runs nothing."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self._stand_ins: dict[str, type[Inert]] = {}

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Return a stand-in, or a dtype; refuse every other name."""
        if module_name == "torch" and global_name in _DTYPES:
            return _DTYPES[global_name]
        if (module_name, global_name) not in _KNOWN:
            raise CheckpointError(
                f"its pickle names {module_name}.{global_name}, which no checkpoint index needs; it was "
                "not run. Do not use this file"
            )
        origin = f"{module_name}.{global_name}"
        return self._stand_ins.setdefault(origin, type("Inert", (Inert,), {"origin": origin}))


class _ChunkUnpickler(pickle.Unpickler):
    """Reads plain tensors and nothing else."""

    def __init__(self, data: bytes, storages: dict[str, Any]) -> None:
        super().__init__(io.BytesIO(data))
        self._read = storages

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Return our stand-in for a name that plain tensors need; refuse every other name."""
        if (module_name, global_name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module_name, global_name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *rest: torch.as_strided(
                storage, size, stride, offset
            )
        if module_name == "torch" and global_name in STORAGE_DTYPES:
            return STORAGE_DTYPES[global_name]
        raise CheckpointError(
            f"its pickle names {module_name}.{global_name}, which no tensor needs; it was not run"
        )

    def persistent_load(self, pid: Any) -> Tensor:
        """Return a storage as a flat tensor."""
        _, dtype, key, _, numel = pid
        return self._read["storage"](dtype, key, numel)


def _content_of_range(file: Any, first_byte: int, num_bytes: int) -> tuple[Any, int]:
    """Return the content of a file's byte range, with its tensors mapped, not read.

    Also return the address that the file's first byte would have.
    """
    first = first_byte - first_byte % mmap.ALLOCATIONGRANULARITY
    skip = first_byte - first
    mapped = mmap.mmap(file.fileno(), num_bytes + skip, access=mmap.ACCESS_COPY, offset=first)
    view = _Range(file.fileno(), first_byte, num_bytes)
    with zipfile.ZipFile(view) as archive:  # type: ignore[arg-type]
        names = [n for n in archive.namelist() if n.endswith("/data.pkl")]
        if len(names) != 1:
            raise CheckpointError("it holds no tensor")
        prefix = names[0].removesuffix("data.pkl")
        order = prefix + "byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise CheckpointError("it is not little-endian")

        def storage(dtype: torch.dtype, key: str, numel: int) -> Tensor:
            info = archive.getinfo(f"{prefix}data/{key}")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size < numel * dtype.itemsize:
                raise CheckpointError(f"storage {key} is too short or compressed")
            if numel == 0:
                return torch.empty(0, dtype=dtype)  # a buffer must not be empty
            view.seek(info.header_offset + 26)
            name, extra = struct.unpack("<HH", view.read(4))
            data = info.header_offset + 30 + name + extra
            return torch.frombuffer(mapped, dtype=dtype, count=numel, offset=skip + data)

        found = _ChunkUnpickler(archive.read(names[0]), {"storage": storage}).load()
    return found, torch.frombuffer(mapped, dtype=torch.uint8, count=1).data_ptr() - first


class _Range(io.RawIOBase):
    """A part of a file, as a file of its own.

    It is read, not mapped: a mapped page that cannot be read ends the process.
    """

    def __init__(self, descriptor: int, first: int, size: int) -> None:
        self._descriptor, self._first, self._size, self._at = descriptor, first, size, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move to a position and return it."""
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes.

        Raises:
            CheckpointError: if they cannot be read. An OSError would make zipfile say "not a zip file".
        """
        left = max(self._size - self._at, 0)
        size = left if size is None or size < 0 else min(size, left)
        try:
            data = os.pread(self._descriptor, size, self._first + self._at)
        except OSError as error:
            raise CheckpointError(f"it cannot be read: {error}") from None
        self._at += len(data)
        return data
