"""Which positions are decided in which step: pure, and a function of the seed.

What diffusion does not decide goes one at a time from left to right (eso-lm section 6; arXiv 2506.01928,
section 4). Letters: B = rows, L = tokens of a row.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from megatron_eso.errors import ConfigError
from megatron_eso.objective.order import likelihood_order
from megatron_eso.objective.randomness import Stream, uniform, uniform_rows

Method = Literal["binomial", "fixed", "strided", "left-to-right"]
METHODS: tuple[Method, ...] = ("binomial", "fixed", "strided", "left-to-right")


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
        """Number of function evaluations (NFE): non-empty steps."""
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

    binomial: for t = 1, 1 - 1/T, ..., 1/T with s = t - 1/T, Binomial(left, (alpha_s - alpha_t) /
    (1 - alpha_t)) tokens are decided, alpha_t = alpha_0 (1 - t). fixed: round(alpha_0 open) tokens in T
    steps as equal as can be. Both take them in random order. strided: step r of T decides the open
    positions r, r + T, r + 2 T, ... in reading order, so that tokens decided together are far apart.
    Whatever is left goes left to right.

    Args:
        is_given: positions that are known; as many in every row.
        alpha_0: expected share of the other positions decided by diffusion, in [0, 1].
        seed: seed of the counts and orders.
        num_steps: diffusion steps T; None: as many as tokens.
        method: how steps are made up.
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
    if method == "binomial":
        counts = _binomial_counts(left, alpha_0, steps, seed)
    elif method == "fixed":
        counts = _even_counts(round(alpha_0 * left), steps)
    elif method == "strided":
        counts = [len(range(step, left, steps)) for step in range(min(steps, left))]
    else:
        counts = []
    if method == "strided":
        order = _strided_order(is_given, steps)
    else:
        order = _orders(is_given, sum(counts), seed, first_row)
    return DecodingPlan(order, is_given.shape[1] - left, [*counts, *[1] * (left - sum(counts))])


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
        num_steps: diffusion steps of the whole row, shared evenly by its blocks; None: one per token.
        method: binomial or fixed.
        seed: seed of the counts and orders.
        first_row: number of the batch's first row.

    Raises:
        ConfigError: if the known tokens are no prefix or the sizes do not divide.
    """
    length = is_given.shape[1]
    num_given = length - _num_open(is_given)
    if method not in ("binomial", "fixed"):
        raise ConfigError(f"plan method {method!r}: block diffusion has binomial and fixed steps")
    check_prefix(is_given, num_given, "block diffusion")
    if length % block_size:
        raise ConfigError(f"a row of {length} tokens does not divide into blocks of {block_size}")
    num_blocks = length // block_size
    steps = max((num_steps or length) // num_blocks, 1)
    key = uniform_rows(seed, 0, _rows(is_given, first_row), Stream.ORDER, length)
    key = torch.where(is_given, -1.0, key) + torch.arange(length) // block_size * 2
    counts = []
    for block in range(num_blocks):
        left = block_size - min(max(num_given - block * block_size, 0), block_size)
        here = min(steps, max(left, 1))
        if method == "fixed":
            counts += _even_counts(left, here)
        else:
            counts += _binomial_counts(left, 1.0, here, seed, draw=block)
    return DecodingPlan(key.argsort(dim=1, stable=True), num_given, counts)


def check_prefix(is_given: Bool[Tensor, "B L"], num_given: int, what: str) -> None:
    """Refuse known tokens behind open ones, for a method that only goes to the right.

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


def _binomial_counts(
    left: int, alpha_0: float, num_steps: int, seed: int, *, draw: int = 0
) -> list[int]:
    """Return the non-zero numbers of tokens decided by the diffusion steps."""
    draws = uniform(seed, 0, 0, Stream.SAMPLE_PLAN, max(left, 1) * num_steps, draw=draw)
    draws = draws.view(num_steps, -1)
    counts = []
    for step in range(num_steps):
        t = 1 - step / num_steps
        keep_now, keep_next = alpha_0 * (1 - t), alpha_0 * (1 - t + 1 / num_steps)
        share = (keep_next - keep_now) / (1 - keep_now)
        count = int((draws[step, :left] < share).sum())
        left -= count
        if count:
            counts.append(count)
    return counts


def _even_counts(number: int, num_steps: int) -> list[int]:
    """Return the positive sizes of ``num_steps`` parts as equal as can be."""
    edges = [number * step // num_steps for step in range(num_steps + 1)]
    return [b - a for a, b in pairwise(edges) if b > a]


def _strided_order(is_given: Tensor, stride: int) -> Int[Tensor, "B L"]:
    open_rank = (~is_given).int().cumsum(dim=1) - 1
    length = is_given.shape[1]
    key = 1 + (open_rank % stride) * length + open_rank // stride
    return torch.where(is_given, 0, key).argsort(dim=1, stable=True)


def _orders(is_given: Tensor, num_diffusion: int, seed: int, first_row: int) -> Int[Tensor, "B L"]:
    """Return each row's order: given in reading order, random ones, the rest in reading order.

    A row's numbers belong to its open positions, counted from the left; so neither padding before
    them nor other rows change its order.
    """
    num_open = int((~is_given[0]).sum())
    drawn = uniform_rows(seed, 0, _rows(is_given, first_row), Stream.ORDER, num_open)
    key = torch.full(is_given.shape, torch.inf, dtype=torch.float64)
    key = key.masked_scatter(~is_given, drawn)
    chosen = torch.zeros_like(is_given)
    if num_diffusion:
        chosen.scatter_(1, key.argsort(dim=1)[:, :num_diffusion], True)
    everything = torch.ones_like(is_given)
    order = likelihood_order(chosen, everything, torch.where(chosen, key, 0.0))
    is_first = is_given.gather(1, order)
    return order.gather(1, (~is_first).int().argsort(dim=1, stable=True))
