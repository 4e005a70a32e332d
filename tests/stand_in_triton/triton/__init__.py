"""A stand-in for triton: megatron-core 0.19 imports it at once, for kernels that a CPU never runs."""

from triton import language


def jit(function=None, **_):
    return function if function is not None else lambda inner: inner


def _decorator(*_, **__):
    return lambda inner: inner


autotune = heuristics = Config = _decorator
next_power_of_2 = cdiv = None
__all__ = ["Config", "autotune", "cdiv", "heuristics", "jit", "language", "next_power_of_2"]
__version__ = "3.0.0"
