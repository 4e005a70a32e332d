"""What the ranks of a data test do; run by ``RankPool`` as "data.rank_jobs.<name>"."""

import os
from pathlib import Path
from typing import Any

import torch

from megatron_eso.config import load_config
from megatron_eso.config.derive import derive
from megatron_eso.config.schema import RunConfig
from megatron_eso.data.reader import RowReader
from megatron_eso.errors import DataError
from megatron_eso.launch.environment import Ranks
from megatron_eso.objective.deal import deal
from megatron_eso.parallel.exchange import Rows, read_together, together
from megatron_eso.train.loop import Run
from megatron_eso.train.session import start_ranks
from tests.data.conftest import SEQUENCE_LENGTH, VOCAB_SIZE

BATCH = 16
SMALL = [
    "model.hidden_size=16", "model.num_layers=2", "model.num_heads=2", f"model.vocab_size={VOCAB_SIZE}",
    f"train.sequence_length={SEQUENCE_LENGTH}", f"train.global_batch_rows={BATCH}",
    "train.micro_batch_rows=2", "train.steps=1000", "train.seed=3", "precision.dtype=fp32",
    "objective.alpha_0=0.5",
]  # fmt: skip


def config_of(overrides: list[str], own: dict[int, list[str]]) -> tuple[RunConfig, Ranks]:
    """Return this rank's configuration: ``own`` holds what single ranks have otherwise."""
    ranks = Ranks.from_environment(os.environ)
    return load_config(None, [*SMALL, *overrides, *own.get(ranks.rank, [])]), ranks


def read_steps(
    overrides: list[str],
    steps: list[int],
    own: dict[int, list[str]] | None = None,
    environment: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Return this rank's rows of some steps, handed on as in training, or the error it got."""
    os.environ.update(environment or {})
    config, ranks = config_of(overrides, own or {})
    config, device, layout = start_ranks(config, ranks)
    derived = derive(config, ranks.world_size)
    batches = deal(
        num_diffusion_rows=derived.num_diffusion_rows,
        num_sequential_rows=derived.num_sequential_rows,
        micro_batch_rows=config.train.micro_batch_rows,
        rank=layout.data_rank,
        num_ranks=layout.data_size,
    )
    numbers = [row for batch in batches for row in batch.rows]
    found: dict[str, Any] = {"data_rank": layout.data_rank, "rows": numbers, "steps": {}}
    try:
        reader = together(lambda: _open(config), device.torch_device)
        for step in steps:
            rows = read_together(
                lambda step=step: _rows(reader, step, numbers),
                layout,
                device.torch_device,
                shape=(len(numbers), SEQUENCE_LENGTH + 1),
            )
            found["steps"][step] = rows.tokens.numpy(), rows.is_valid.numpy()
        reader.close()
    except DataError as error:
        found["error"] = str(error)
    return found


def run(overrides: list[str], own: dict[int, list[str]]) -> tuple[str, bool]:
    """Train by the whole loop; return the error this rank got and whether a step was done."""
    config, ranks = config_of(overrides, own)
    try:
        Run(config, ranks).train()
    except DataError as error:
        return str(error), (Path(config.folder) / "metrics.jsonl").is_file()
    return "", True


def _open(config: RunConfig) -> RowReader:
    return RowReader(
        config.data, sequence_length=SEQUENCE_LENGTH, vocab_size=VOCAB_SIZE,
        global_batch_rows=BATCH, seed=config.train.seed,
    )  # fmt: skip


def _rows(reader: RowReader, step: int, numbers: list[int]) -> Rows:
    read = reader.read(step, numbers)
    return Rows(torch.from_numpy(read.tokens), torch.from_numpy(read.is_valid))
