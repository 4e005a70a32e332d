"""The released Transformer Engine, over the stand-in for its compiled half, on a CPU.

This folder stands before the unpacked wheel on the path and takes its modules from there, so that the
Python code is the released one, line by line. Two things are put in place once it is imported: the name
``transformer_engine_torch`` is the stand-in, which is no library to be loaded, and the name ``torch`` in
its modules is PyTorch with a CPU in the place of a GPU (:mod:`cpu_torch`).
"""

import importlib
import os
import sys
from importlib import metadata
from pathlib import Path

_HERE = Path(__file__).parent
_RELEASED = [
    folder
    for entry in sys.path
    if (folder := Path(entry) / __name__).is_dir() and (folder / "pytorch" / "module").is_dir()
]
if not _RELEASED:
    raise ImportError("the stand-in needs an unpacked wheel of transformer_engine on the path")
__path__ = [str(_HERE), str(_RELEASED[0])]
os.environ["NVTE_PROJECT_BUILDING"] = "1"  # looks for no library of its own or of CUDA
os.environ["NVTE_TORCH_COMPILE"] = "0"

common = importlib.import_module("transformer_engine.common")
common.load_framework_extension = lambda framework: None
cpu_torch = importlib.import_module("transformer_engine.cpu_torch")
importlib.import_module("transformer_engine.reader").install()
pytorch = importlib.import_module("transformer_engine.pytorch")
cpu_torch.take_the_place_of_torch()

__version__ = metadata.version("transformer_engine")
__all__ = ["common", "pytorch"]
