"""A run's training data: the same on all ranks, and the same as when its checkpoint was written."""

import platform
from pathlib import Path
from typing import Any

import torch

from megatron_eso.config.schema import RunConfig
from megatron_eso.data.reader import RowReader
from megatron_eso.errors import CheckpointError, DataError
from megatron_eso.parallel.exchange import from_first_rank, together


def open_training_data(config: RunConfig, device: torch.device) -> RowReader:
    """Return this rank's reader. All ranks must call this.

    Args:
        config: the run.
        device: device of the collectives.

    Raises:
        DataError: on all ranks, if one cannot open the data, or holds other data than the first rank.
    """
    # Where a rank's store, cache or disk fails, the others must not wait for it.
    reader = together(lambda: _open(config), device)
    first = from_first_rank(reader.fingerprint, device)

    def compare() -> None:
        changed = changed_data(first, reader)
        if changed:
            raise DataError(
                f"data.sources on {platform.node()} are not those of the first rank ({', '.join(changed)} "
                "differ): a path must lead to the same data on every node"
            )

    together(compare, device)
    return reader


def changed_data(stored: dict[str, Any], reader: RowReader) -> list[str]:
    """Return what differs between a stored fingerprint of training data and a reader's."""
    return [name for name, value in reader.fingerprint().items() if stored.get(name) != value]


def require_same_data(path: Path, facts: dict[str, Any], reader: RowReader) -> None:
    """Refuse to continue a checkpoint on other data.

    Raises:
        CheckpointError: naming what differs.
    """
    changed = changed_data(facts["data"], reader)
    if changed:
        raise CheckpointError(
            f"{path} was trained on other data ({', '.join(changed)} differ): continuing would repeat "
            "or skip samples; restore data.sources or choose another folder"
        )


def require_same_tokenizer(path: Path, facts: dict[str, Any], reader: RowReader) -> None:
    """Refuse weights trained with another tokenizer than the data's, where both are known.

    Raises:
        CheckpointError: naming both, and how to prepare the data with the weights' own.
    """
    theirs = facts.get("data", {}).get("tokenizer")
    mine = reader.fingerprint().get("tokenizer")
    if theirs and mine and theirs != mine:
        raise CheckpointError(
            f"checkpoint.init_from={path} was trained with another tokenizer (sha256 {theirs}) than "
            f"the data was prepared with ({mine}): its ids stand for other tokens. Prepare the data "
            f"with that one (data prepare --tokenizer {facts.get('tokenizer') or 'FILE'})"
        )


def _open(config: RunConfig) -> RowReader:
    return RowReader(
        config.data,
        sequence_length=config.train.sequence_length,
        vocab_size=config.model.vocab_size,
        global_batch_rows=config.train.global_batch_rows,
        seed=config.train.seed,
    )
