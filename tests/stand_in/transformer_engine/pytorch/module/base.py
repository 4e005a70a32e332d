"""User buffers: their shape is fixed, and a layer that would use them with another one fails."""

from enum import Enum

from transformer_engine.pytorch.fp8 import Stateful as TransformerEngineBaseModule

__all__ = [
    "TransformerEngineBaseModule",
    "UserBufferQuantizationMode",
    "destroy_ub",
    "initialize_ub",
]


class UserBufferQuantizationMode(Enum):
    NONE = "none"
    FP8 = "fp8"


buffers = None
"""What :func:`initialize_ub` was asked for, and how often layers used them."""


def initialize_ub(shape, tp_size, quantization_modes, bootstrap_backend):
    global buffers
    assert buffers is None, "UB communicators are already initialized."
    assert all(isinstance(mode, UserBufferQuantizationMode) for mode in quantization_modes)
    if shape[0] % tp_size:
        raise RuntimeError(f"{shape[0]} tokens cannot be dealt to {tp_size} ranks")
    buffers = {
        "shape": shape, "tp_size": tp_size, "backend": bootstrap_backend, "uses": {},
        "modes": [mode.value for mode in quantization_modes],
    }  # fmt: skip


def destroy_ub():
    global buffers
    buffers = None


def use_buffer(name, num_tokens):
    """Take the tokens of all tensor ranks into a buffer, or out of it."""
    assert buffers is not None, "UB manager is not initialized."
    assert num_tokens == buffers["shape"][0], f"{name}: {num_tokens} tokens, not {buffers['shape']}"
    buffers["uses"][name] = buffers["uses"].get(name, 0) + 1
