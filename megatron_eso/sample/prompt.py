"""Rows to fill: prompts at their start, of equal or different lengths, or text with gaps."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_eso.config.schema import ModelConfig
from megatron_eso.errors import ConfigError

GAP = re.compile(r"\[\[(\d+)\]\]")


@dataclass(frozen=True)
class Canvas:
    """Rows, and what is known of them."""

    tokens: Tensor
    """[B, L]; the mask token where nothing is known."""
    is_given: Tensor
    """[B, L] known tokens and padding; the same number in every row."""
    padding: Tensor
    """[B] columns at the left that do not belong to the row."""

    @property
    def num_open(self) -> int:
        """Number of tokens to decide per row."""
        return int((~self.is_given[0]).sum())


def rows_with_prompts(prompts: Sequence[list[int]], length: int, model: ModelConfig) -> Canvas:
    """Return rows to fill, in which the longest prompt and its new tokens make ``length`` tokens.

    Shorter prompts are padded at the left, so every row gets the same number of new tokens.

    Args:
        prompts: token ids of each row's start; may be empty.
        length: tokens of the row with the longest prompt, its prompt included.
        model: vocabulary and rotary table.

    Raises:
        ConfigError: if a prompt does not fit the row or holds the mask token, or the row is longer than
            the rotary table.
    """
    if not prompts:
        raise ConfigError("--num-samples 0 must be at least 1")
    _check_length(length, model)
    longest = max(len(ids) for ids in prompts)
    if longest >= length:
        longer = f" or raise --length, to {model.max_length} at most"
        raise ConfigError(
            f"the prompt has {longest} tokens and leaves nothing to decide in a row of {length}; "
            f"shorten it{longer if longest < model.max_length else ''}"
        )
    tokens = torch.full((len(prompts), length), model.vocab_size - 1, dtype=torch.int64)
    for row, ids in enumerate(prompts):
        _check_ids(ids, model)
        tokens[row, longest - len(ids) : longest] = torch.tensor(ids, dtype=torch.int64)
    is_given = (torch.arange(length) < longest).expand_as(tokens)
    padding = torch.tensor([longest - len(ids) for ids in prompts])
    return Canvas(tokens, is_given.clone(), padding)


def rows_with_gaps(
    text: str, num_rows: int, model: ModelConfig, encode: Callable[[str], list[int]]
) -> Canvas:
    """Return copies of a text in which ``[[N]]`` stands for N tokens to decide.

    Raises:
        ConfigError: if there is no gap, the row does not fit, or the text holds the mask token.
    """
    known = GAP.split(text)
    if num_rows < 1:
        raise ConfigError(f"--num-samples {num_rows} must be at least 1")
    if len(known) == 1 or not any(size.strip("0") for size in known[1::2]):
        raise ConfigError("--infill has no gap; write [[N]] where N tokens are to be filled in")
    # Checked before any gap is made: a typing error may ask for more than memory holds.
    _check_length(sum(int(size) if len(size) < 10 else 10**9 for size in known[1::2]), model)
    ids: list[int] = []
    is_open: list[bool] = []
    for number, part in enumerate(known):
        is_gap = number % 2 == 1
        new = [model.vocab_size - 1] * int(part) if is_gap else encode(part) if part else []
        if not is_gap:
            _check_ids(new, model)
        ids += new
        is_open += [is_gap] * len(new)
    _check_length(len(ids), model)
    tokens = torch.tensor(ids).expand(num_rows, -1).clone()
    is_given = ~torch.tensor(is_open).expand(num_rows, -1)
    return Canvas(tokens, is_given, torch.zeros(num_rows, dtype=torch.int64))


def _check_length(length: int, model: ModelConfig) -> None:
    if length > model.max_length:
        raise ConfigError(
            f"rows of {length} tokens are longer than the model's rotary table ({model.max_length}); make "
            "them shorter (--length, --infill)"
        )


def _check_ids(ids: list[int], model: ModelConfig) -> None:
    if ids and max(ids) >= model.vocab_size - 1:
        raise ConfigError(
            f"the prompt holds token {max(ids)}; ids must be below the mask token's "
            f"{model.vocab_size - 1}"
        )
