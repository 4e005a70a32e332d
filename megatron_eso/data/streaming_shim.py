"""The only door to mosaicml-streaming: its compression, hashes, shuffle and downloads.

``import streaming`` pulls in torchvision, transformers and its own dataset class, whose fault handling
this package replaces; its wheel pins an old numpy. So empty modules are first put in place of
``streaming`` and ``streaming.base``; their submodules then import on their own. The package is installed
without its dependencies. A contract test pins the version that these internals belong to.
"""

import importlib
import importlib.metadata
import importlib.util
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_eso.errors import DataError

SUPPORTED_VERSION = "0.13"
INSTALL_COMMAND = (
    "pip install --no-deps mosaicml-streaming==0.13.0 && pip install numpy brotli python-snappy "
    "zstd xxhash tqdm catalogue filelock pillow requests"
)
HASH_ALGORITHM = "xxh64"


def load(submodule: str) -> ModuleType:
    """Return ``streaming.base.<submodule>`` without running the packages' own ``__init__``.

    Raises:
        DataError: if the package or a module it needs is missing, or its version is not the one that
            these internals belong to.
    """
    _place_bare_packages()
    try:
        return importlib.import_module(f"streaming.base.{submodule}")
    except ImportError as error:
        raise DataError(
            f"mosaicml-streaming cannot be imported ({error}); install it with: {INSTALL_COMMAND}"
        ) from error


def epoch_permutation(
    shard_sizes: NDArray[np.int64], *, nodes: int, seed: int, epoch: int, block_size: int
) -> NDArray[np.int64]:
    """Return streaming's ``py1e`` order of one epoch: the sample number at each place."""
    with warnings.catch_warnings():
        # SampleOrder warns once, and names our setting; streaming warns at every call.
        warnings.filterwarnings("ignore", message="Shuffle block size was smaller")
        shuffle = load("shuffle").get_shuffle
        return shuffle("py1e", shard_sizes, nodes, seed, epoch, block_size)


def file_hash(data: bytes) -> str:
    """Return the hash of ``data`` as shard indexes have it."""
    return load("hashing").get_hash(HASH_ALGORITHM, data)


def known_hash(algorithm: str, data: bytes) -> str:
    """Return the hash of ``data`` by an algorithm named in streaming's index files."""
    return load("hashing").get_hash(algorithm, data)


def compress(compression: str, data: bytes) -> bytes:
    """Return the compressed bytes of a shard file."""
    return load("compression").compress(compression, data)


def decompress(compression: str, data: bytes) -> bytes:
    """Return the decompressed bytes of a compressed shard file."""
    return load("compression").decompress(compression, data)


def downloader(address: str) -> Any:
    """Return streaming's downloader for an address's scheme (gs, azure, oci, hf, ...)."""
    load("format")  # it and streaming.base.util import each other, which only works in this order
    return load("storage.download").CloudDownloader.get(address)


def _place_bare_packages() -> None:
    if "streaming" in sys.modules:
        return
    found = importlib.util.find_spec("streaming")
    if found is None or not found.submodule_search_locations:
        raise DataError(f"mosaicml-streaming is not installed; install it with: {INSTALL_COMMAND}")
    version = importlib.metadata.version("mosaicml-streaming")
    if not version.startswith(f"{SUPPORTED_VERSION}."):
        raise DataError(
            f"mosaicml-streaming {version} is installed, this package reads the internals of "
            f"{SUPPORTED_VERSION}; install it with: {INSTALL_COMMAND}"
        )
    root = Path(next(iter(found.submodule_search_locations)))
    for name, folder in (("streaming", root), ("streaming.base", root / "base")):
        module = ModuleType(name)
        module.__path__ = [str(folder)]
        sys.modules[name] = module
