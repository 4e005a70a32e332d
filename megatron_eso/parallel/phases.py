"""Marks of what a step is doing, for the profiler: they cost nothing that is worth counting.

While a step is profiled the device is waited for at both ends of a phase, so that what it computes counts
where it was issued. That makes the profiled step slower.
"""

import contextlib
from collections.abc import Iterator

import torch

PREFIX = "phase: "
_waits = False


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Mark what runs within as one phase of the step; an inner phase counts for itself alone."""
    with torch.profiler.record_function(PREFIX + name):
        _wait()
        yield
        _wait()


@contextlib.contextmanager
def waiting_for_device() -> Iterator[None]:
    """Within it phases wait for a GPU."""
    global _waits
    _waits = torch.cuda.is_available()
    try:
        yield
    finally:
        _waits = False


def _wait() -> None:
    if _waits:
        torch.cuda.synchronize()
