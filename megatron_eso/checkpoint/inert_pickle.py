"""Read a torch file without running anything that its pickle names.

A torch file is a zip archive: ``data.pkl`` and one member per storage. A pickle can name any function
of any module and have it called while it is read. Here only torch's two tensor-rebuilding names, for
which our own functions stand in, and ``OrderedDict`` mean something. Every other name becomes an
:class:`Inert` class, whose instances only remember what the pickle put into them. Storages are mapped
from the file, so tensors that nobody reads (an optimizer's moments) cost no memory.
"""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_eso.errors import CheckpointError

STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
"""Dtypes by the names of storages in torch files."""
_LOCAL_HEADER_BYTES = 30  # of a zip member, before its name


class Inert:
    """Stands for an instance of a class that the pickle names; nothing of that class is ever run."""

    origin = ""
    """module.name of the class."""
    args: tuple[Any, ...]
    state: Any
    items: dict[Any, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        """Remember the arguments."""
        self = super().__new__(cls)
        self.args, self.state, self.items = args, None, {}
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        """Remember a list entry."""
        self.items[len(self.items)] = value

    add = append


def read_torch_file(path: Path) -> Any:
    """Return the content of a ``torch.save`` file, with unknown classes as :class:`Inert`.

    Raises:
        CheckpointError: if it is not such a file, is damaged, or needs anything but plain tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if n.endswith("/data.pkl")]
            if len(names) != 1:
                raise CheckpointError(f"{path} is not a torch file: it holds no data.pkl")
            prefix = names[0].removesuffix("data.pkl")
            if prefix + "byteorder" in archive.namelist():
                order = archive.read(prefix + "byteorder")
                if order != b"little":
                    raise CheckpointError(
                        f"{path} is {order.decode()}-endian; only little-endian files are read"
                    )
            return _Unpickler(path, archive, prefix).load()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    except zipfile.BadZipFile:
        raise CheckpointError(
            f"{path} is not a zip archive: only files of torch.save since torch 1.6 are read"
        ) from None
    except CheckpointError:
        raise
    except Exception as error:  # a pickle may fail in any way
        raise CheckpointError(f"{path} holds a pickle that cannot be read: {error}") from error


class _Unpickler(pickle.Unpickler):
    """Resolves names to our own functions or inert classes, and storages to mapped bytes."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, prefix: str) -> None:
        super().__init__(io.BytesIO(archive.read(prefix + "data.pkl")), encoding="utf-8")
        self._archive, self._prefix = archive, prefix
        # Copy on write: torch wants writable memory; the file never changes.
        self._bytes = np.memmap(path, dtype=np.uint8, mode="c")
        self._storages: dict[str, Tensor] = {}
        self._inert: dict[str, type[Inert]] = {}

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Return what a name in the pickle stands for; never import anything."""
        if module_name == "collections" and global_name == "OrderedDict":
            return OrderedDict
        if module_name == "torch._utils" and global_name == "_rebuild_tensor_v2":
            return _rebuild_tensor
        if module_name == "torch._utils" and global_name == "_rebuild_parameter":
            return _rebuild_parameter
        origin = f"{module_name}.{global_name}"
        if origin not in self._inert:
            self._inert[origin] = type("Inert", (Inert,), {"origin": origin})
        return self._inert[origin]

    def persistent_load(self, pid: Any) -> Tensor:
        """Return a storage as a flat tensor that shares the file's pages."""
        _, kind, key, _, numel = pid
        dtype = STORAGE_DTYPES.get(kind.origin.removeprefix("torch."))
        if dtype is None:
            raise CheckpointError(f"a tensor's storage is a {kind.origin}, which is not read")
        if key not in self._storages:
            data = self._member(f"{self._prefix}data/{key}")
            if len(data) < numel * dtype.itemsize:
                raise CheckpointError(
                    f"storage {key} holds {len(data)} bytes for {numel} elements of {dtype}"
                )
            self._storages[key] = torch.from_numpy(data[: numel * dtype.itemsize]).view(dtype)
        return self._storages[key]

    def _member(self, name: str) -> np.ndarray:
        info = self._archive.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{name} is compressed, as torch never writes it")
        first = info.header_offset
        header = self._bytes[first : first + _LOCAL_HEADER_BYTES].tobytes()
        lengths = struct.unpack("<HH", header[26:30])
        first += _LOCAL_HEADER_BYTES + sum(lengths)
        return self._bytes[first : first + info.file_size]


def _rebuild_tensor(storage: Tensor, offset: int, size: Any, stride: Any, *rest: Any) -> Tensor:
    """Return a view of a storage; torch checks that it stays inside."""
    return torch.as_strided(storage, size, stride, offset)


def _rebuild_parameter(data: Tensor, *rest: Any) -> Tensor:
    return data


def plain(value: Any) -> Any:
    """Return the plain content of an OmegaConf container or node that was read as :class:`Inert`."""
    if isinstance(value, Inert) and isinstance(value.state, dict):
        if value.origin.startswith("omegaconf."):
            return plain(value.state.get("_content", value.state.get("_val")))
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items() if isinstance(key, str)}
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    return value
