"""Nats per row under the model, summed over orders and repeats, and what is reported from them.

Letters: B = rows scored, K = orders.
"""

import math
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Score:
    """One metric of one data set."""

    metric: str
    nats_per_token: float
    standard_error: float | None
    """Of nats_per_token, over rows; None for a single row, which says nothing about it."""
    perplexity: float
    bits_per_token: float
    bits_per_byte: float
    num_rows: int
    num_tokens: int

    def shown_error(self) -> str:
        """Return the standard error as a person reads it."""
        return "?" if self.standard_error is None else f"{self.standard_error:.4f}"

    def as_dict(self) -> dict:
        """Return the fields as a dictionary."""
        return asdict(self)


def score(
    metric: str,
    nats: Float[Tensor, " B"],
    tokens: Float[Tensor, " B"],
    bytes_per_token: float,
) -> Score:
    """Return a metric from nats and token counts of each row.

    Args:
        metric: its name.
        nats: negative log-likelihood (or its bound) of each row.
        tokens: valid tokens of each row.
        bytes_per_token: UTF-8 bytes of text per token.
    """
    total = float(tokens.sum())
    mean = float(nats.sum()) / total
    # Ratio estimator: the deviation of each row from the mean rate, per average row.
    deviation = nats - mean * tokens
    count = len(nats)
    error = None
    if count > 1:
        variance = float((deviation**2).sum()) / (count - 1)
        error = math.sqrt(variance / count) / (total / count)
    return Score(
        metric=metric,
        nats_per_token=mean,
        standard_error=error,
        perplexity=math.exp(min(mean, 700.0)),
        bits_per_token=mean / math.log(2),
        bits_per_byte=mean / math.log(2) / bytes_per_token,
        num_rows=count,
        num_tokens=int(total),
    )


class LogMeanExp:
    """log(mean_k exp(x_k)) per row, of terms that arrive one after the other."""

    def __init__(self) -> None:
        self.count = 0
        self._log_sum: Tensor | None = None

    def add(self, log_probs: Float[Tensor, " B"]) -> None:
        """Add one more term for every row."""
        self._log_sum = (
            log_probs if self._log_sum is None else torch.logaddexp(self._log_sum, log_probs)
        )
        self.count += 1

    @property
    def value(self) -> Float[Tensor, " B"]:
        """Return the mean of the terms so far; there must be one."""
        assert self._log_sum is not None
        return self._log_sum - math.log(self.count)


def is_power_of_ten(number: int) -> bool:
    """Return whether a positive number is 1, 10, 100, ..."""
    return number == 10 ** (len(str(number)) - 1)
