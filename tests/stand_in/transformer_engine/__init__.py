"""A stand-in for Transformer Engine on a CPU, in plain torch, for tests alone.

It has the names and constructor arguments that Megatron's own Transformer Engine classes use, written
from their documentation, so that those classes build and train without a GPU. FP8 is imitated: inputs
of matrix products are rounded to e4m3 with a delayed scale, so results depend on the state that the
layers carry. Speed, kernels and the real rounding of Transformer Engine are not what it is for.
"""

from transformer_engine import common, pytorch

__version__ = "2.9.0"
__all__ = ["common", "pytorch"]
