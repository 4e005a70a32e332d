"""Marks that tell the profiler what a step is doing; their cost is negligible.

While a step is profiled, each phase waits for the device at both ends, so that the device's work counts in
the phase that issued it. That makes the profiled step slower.
"""

import contextlib
from collections.abc import Iterator

import torch

PREFIX = "phase: "
_waits = False


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Mark what runs inside as one phase of the step. Time of an inner phase counts only there."""
    with torch.profiler.record_function(PREFIX + name):
        _wait()
        yield
        _wait()


@contextlib.contextmanager
def waiting_for_device() -> Iterator[None]:
    """Make phases inside wait for the GPU, if there is one."""
    global _waits
    _waits = torch.cuda.is_available()
    try:
        yield
    finally:
        _waits = False


def _wait() -> None:
    if _waits:
        torch.cuda.synchronize()
