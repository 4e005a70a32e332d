"""Uniform numbers that are a pure function of (seed, step, row, stream).

A counter-based generator (Philox 4x64) is keyed by the seed and the stream and starts at a counter
made of step and row. No state is carried, so any rank, stage or layout computes the same numbers for
the same row, and a resumed run continues exactly.
"""

from enum import IntEnum

import numpy as np
import torch
from jaxtyping import Float
from numpy.random import Philox
from torch import Tensor

_UNIT = 2.0**-53  # 53 random bits make a float64 in [0, 1)


class Stream(IntEnum):
    """What a number is drawn for; streams never share numbers."""

    TIME = 1
    MASK = 2
    ORDER = 3
    EVAL_ORDER = 4
    SAMPLE_PLAN = 5
    SAMPLE_TOKEN = 6
    WEIGHTS = 7
    DROPOUT = 8


def uniform(
    seed: int, step: int, row: int, stream: Stream, count: int, *, draw: int = 0
) -> Float[Tensor, " count"]:
    """Return ``count`` float64 numbers in [0, 1).

    Args:
        seed: seed of the run.
        step: optimizer step, or another index of repetition.
        row: number of the row in the global batch.
        stream: what the numbers are for.
        count: how many.
        draw: further index, for repeated draws of one row (such as orders of a likelihood bound).
    """
    # The generator itself counts in the lowest word: at least 2**64 numbers lie between two draws.
    philox = Philox(key=[seed, int(stream)], counter=[0, draw, row, step])
    raw = np.asarray(philox.random_raw(count), dtype=np.uint64)
    return torch.from_numpy((raw >> np.uint64(11)).astype(np.float64) * _UNIT)


def uniform_rows(
    seed: int, step: int, rows: list[int], stream: Stream, count: int, *, draw: int = 0
) -> Float[Tensor, "B count"]:
    """Return one row of :func:`uniform` numbers for each row number."""
    if not rows:
        return torch.zeros(0, count, dtype=torch.float64)
    return torch.stack([uniform(seed, step, row, stream, count, draw=draw) for row in rows])
