"""An official Eso-LM checkpoint in, one of our checkpoints out."""

from dataclasses import replace
from pathlib import Path

from megatron_eso.checkpoint.folder import CheckpointFolder
from megatron_eso.checkpoint.write_weights import write_weights
from megatron_eso.config.schema import RunConfig
from megatron_eso.data.tokenizer import Tokenizer
from megatron_eso.export.official import OfficialModel, read_official


def import_official(
    checkpoint: Path,
    out: Path,
    *,
    weights: str = "ema",
    num_heads: int | None = None,
    sequence_length: int | None = None,
    tokenizer: Path | None = None,
) -> tuple[CheckpointFolder, OfficialModel]:
    """Convert a Lightning file of the official code; return the checkpoint and what the file holds.

    Must run in a single process.

    Args:
        checkpoint: the file.
        out: folder of the new checkpoint; must not exist or must be empty.
        weights: ``ema`` or ``raw``.
        num_heads: attention heads; None: from the file.
        sequence_length: tokens in a row; None: from the file.
        tokenizer: ``tokenizer.json`` to keep beside the weights; None: the one inside the file.

    Raises:
        CheckpointError: if the file cannot be read or expressed, or the folder is not empty.
    """
    official = read_official(
        checkpoint, weights=weights, num_heads=num_heads, sequence_length=sequence_length
    )
    config = RunConfig()
    config = replace(
        config,
        model=official.model,
        objective=official.objective,
        train=replace(config.train, sequence_length=official.sequence_length, steps=1),
    )
    text = official.tokenizer_json
    if tokenizer is not None:
        text = Tokenizer(tokenizer, requires_end=False).path.read_text()
    folder = write_weights(
        out,
        config,
        official.weights,
        step=official.step,
        tokenizer_json=text,
        origin={"format": "official", "file": checkpoint.name, "weights": weights},
    )
    return folder, official
