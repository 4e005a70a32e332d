"""The only module that touches mosaicml-streaming's internals (0.13.0).

``import streaming`` pulls in torchvision, which fails beside a CPU build of torch, and a training loop
we do not use. Its writer and its shuffle are self-contained: with bare package modules placed first,
they are imported alone. tests/test_data.py pins what is used.
"""

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np

from megatron_eso.errors import DataError

VERSION = "0.13.0"
_INSTALL = f"pip install --no-deps mosaicml-streaming=={VERSION}"


def mds_writer(**settings: Any) -> Any:
    """Return streaming's MDSWriter with these settings."""
    return _module("streaming.base.format.mds.writer").MDSWriter(**settings)


def shuffled_order(
    shard_sizes: np.ndarray, *, canonical_nodes: int, seed: int, epoch: int, block_size: int
) -> np.ndarray:
    """Return streaming's py1e permutation of an epoch's samples, a pure function of its arguments."""
    shuffle = _module("streaming.base.shuffle.py1e").get_shuffle_py1e
    return shuffle(shard_sizes, canonical_nodes, seed, epoch, block_size)


def _module(name: str) -> Any:
    if "streaming" not in sys.modules:
        _place_bare_packages()
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(
            f"{error}; the data layer needs: {_INSTALL}, and megatron-eso[train]"
        ) from None


def _place_bare_packages() -> None:
    spec = importlib.util.find_spec("streaming")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"mosaicml-streaming is not installed: {_INSTALL}")
    root = Path(next(iter(spec.submodule_search_locations)))
    places = {
        "streaming": root,
        "streaming.base": root / "base",
        "streaming.base.format": root / "base/format",
        "streaming.base.format.mds": root / "base/format/mds",
        "streaming.base.shuffle": root / "base/shuffle",
    }
    for name, path in places.items():
        package = types.ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules[name] = package
