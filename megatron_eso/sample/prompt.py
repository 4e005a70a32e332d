"""Rows to fill, with a prompt at their start."""

import torch
from torch import Tensor

from megatron_eso.config.schema import ModelConfig
from megatron_eso.errors import ConfigError


def rows_with_prompt(
    ids: list[int], num_rows: int, length: int, model: ModelConfig
) -> tuple[Tensor, Tensor]:
    """Return [B, L] tokens and which of them are given.

    Raises:
        ConfigError: if the prompt does not fit the row or holds the mask token, or the row is longer
            than the rotary table.
    """
    if num_rows < 1:
        raise ConfigError(f"--num-samples {num_rows} must be at least 1")
    if length > model.max_length:
        raise ConfigError(
            f"rows of {length} tokens are longer than the model's rotary table ({model.max_length})"
        )
    if len(ids) >= length:
        raise ConfigError(
            f"the prompt has {len(ids)} tokens and leaves nothing to decide in a row of {length}; "
            "shorten it or raise --length"
        )
    if ids and max(ids) >= model.vocab_size - 1:
        raise ConfigError(
            f"the prompt holds token {max(ids)}; ids must be below the mask token's "
            f"{model.vocab_size - 1}"
        )
    tokens = torch.full((num_rows, length), model.vocab_size - 1, dtype=torch.int64)
    tokens[:, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
    is_given = torch.zeros(num_rows, length, dtype=torch.bool)
    is_given[:, : len(ids)] = True
    return tokens, is_given
