"""Which positions of a batch are decided in which step: a pure function of the seed.

Counts and orders of one row come from ``export/hf/decoding_esolm.py``, which exported models run too.
Letters: B = rows, L = tokens of a row.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from megatron_eso.errors import ConfigError
from megatron_eso.export.hf.decoding_esolm import (
    binomial_counts,
    diffusion_counts,
    even_counts,
    row_order,
)
from megatron_eso.objective.randomness import Stream, uniform_rows
from megatron_eso.sample.settings import METHODS, Method


@dataclass(frozen=True)
class DecodingPlan:
    """An order for each row and how many of its positions each step decides."""

    order: Int[Tensor, "B L"]
    """Positions in the order they enter the model: given tokens first, then step by step."""
    num_given: int
    """Positions that are known from the start, the same number in every row."""
    counts: list[int]
    """Positions decided per step; all positive; they sum to L - num_given."""

    @property
    def num_evaluations(self) -> int:
        """Number of network evaluations (NFE): the non-empty steps."""
        return len(self.counts)


def make_plan(
    is_given: Bool[Tensor, "B L"],
    *,
    alpha_0: float,
    seed: int,
    num_steps: int | None = None,
    method: Method = "binomial",
    first_row: int = 0,
) -> DecodingPlan:
    """Return the plan of a batch of rows.

    * binomial: for t = 1, 1 - 1/T, ..., 1/T with s = t - 1/T, a step decides
      Binomial(left, (alpha_s - alpha_t) / (1 - alpha_t)) tokens, where alpha_t = alpha_0 (1 - t).
    * fixed: round(alpha_0 open) tokens in T steps of sizes as equal as possible.
    * strided: step r of T decides the open positions r, r + T, r + 2 T, ... in reading order, so that
      tokens decided together are far apart.

    binomial and fixed take tokens in random order. Whatever is left goes left to right, one at a time.

    Args:
        is_given: positions that are known; the same number in every row.
        alpha_0: expected share of the other positions decided by diffusion, in [0, 1].
        seed: seed of the counts and orders.
        num_steps: diffusion steps T; None: as many as tokens.
        method: how steps are made up: one of the above, or left-to-right, which has no diffusion steps.
        first_row: number of the batch's first row, so that a row's order does not depend on its batch.

    Raises:
        ConfigError: for a setting out of range or rows with different numbers of given tokens.
    """
    if not 0 <= alpha_0 <= 1:
        raise ConfigError(f"alpha_0={alpha_0} must be in [0, 1]")
    if method not in METHODS:
        raise ConfigError(f"plan method {method!r} is not one of {', '.join(METHODS)}")
    if method == "strided" and alpha_0 < 1:
        raise ConfigError(
            f"a strided plan decides every token by diffusion: alpha_0={alpha_0} must be 1"
        )
    left = _num_open(is_given)
    steps = max(left, 1) if num_steps is None else num_steps
    if steps < 1 or (left and steps > left and alpha_0 > 0):
        raise ConfigError(f"num_steps={steps} must be between 1 and the {left} open tokens")
    counts = diffusion_counts(left, method=method, alpha_0=alpha_0, num_steps=num_steps, seed=seed)
    common = {"method": method, "num_diffusion": sum(counts), "num_steps": num_steps, "seed": seed}
    orders = []
    for row, given in enumerate(is_given.tolist(), start=first_row):
        known = [place for place, value in enumerate(given) if value]
        orders.append(known + row_order([not value for value in given], row=row, **common))
    single = [1] * (left - sum(counts))
    return DecodingPlan(torch.tensor(orders), is_given.shape[1] - left, counts + single)


def make_block_plan(
    is_given: Bool[Tensor, "B L"],
    *,
    block_size: int,
    num_steps: int | None = None,
    method: Method = "binomial",
    seed: int,
    first_row: int = 0,
) -> DecodingPlan:
    """Return the plan of block diffusion: blocks from left to right, each by diffusion inside.

    Args:
        is_given: positions that are known: a prefix of the same length in every row.
        block_size: tokens of a block; divides L.
        num_steps: diffusion steps for all open tokens, divided among the blocks in proportion to their
            open tokens; a block with open tokens takes at least one. None: one per token.
        method: binomial or fixed.
        seed: seed of the counts and orders.
        first_row: number of the batch's first row.

    Raises:
        ConfigError: if the known tokens are not a prefix or the sizes do not divide.
    """
    length = is_given.shape[1]
    num_given = length - _num_open(is_given)
    if method not in ("binomial", "fixed"):
        raise ConfigError(f"plan method {method!r}: block diffusion has binomial and fixed steps")
    check_prefix(is_given, num_given, "block diffusion")
    if length % block_size:
        raise ConfigError(f"a row of {length} tokens does not divide into blocks of {block_size}")
    num_open = length - num_given
    steps = num_steps or num_open
    key = uniform_rows(seed, 0, _rows(is_given, first_row), Stream.ORDER, length)
    key = torch.where(is_given, -1.0, key) + torch.arange(length) // block_size * 2
    counts, taken = [], 0
    for block in range(num_given // block_size, length // block_size):
        end = (block + 1) * block_size
        left = min(end - num_given, block_size)
        here = min(max(steps * (end - num_given) // num_open - taken, 1), left)
        taken += here
        if method == "fixed":
            counts += even_counts(left, here)
        else:
            counts += binomial_counts(left, 1.0, here, seed, draw=block)
    return DecodingPlan(key.argsort(dim=1, stable=True), num_given, counts)


def check_prefix(is_given: Bool[Tensor, "B L"], num_given: int, what: str) -> None:
    """Refuse known tokens behind open ones, for a method that goes from left to right.

    Raises:
        ConfigError: naming the method.
    """
    if not bool(is_given[:, :num_given].all()):
        raise ConfigError(
            f"{what} goes from left to right and cannot fill gaps: the given tokens must be the row's "
            "first ones"
        )


def _num_open(is_given: Bool[Tensor, "B L"]) -> int:
    given = is_given.sum(dim=1)
    if int(given.min()) != int(given.max()):
        raise ConfigError("the rows of one batch must have the same number of given tokens")
    return is_given.shape[1] - int(given[0])


def _rows(is_given: Tensor, first_row: int) -> list[int]:
    return list(range(first_row, first_row + is_given.shape[0]))
