"""Reads measured runs: run folders of the trainer, and the YAML table of published runs."""

import json
import statistics
from pathlib import Path
from typing import Any

import yaml

from megatron_eso.config.load import load_config
from megatron_eso.config.schema import (
    ModelConfig,
    ObjectiveConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    TrainConfig,
)
from megatron_eso.errors import ConfigError, DataError
from megatron_eso.plan.calibrate import Measured
from megatron_eso.plan.flops import model_flops_per_step
from megatron_eso.plan.job import Job


def read_measured(path: Path) -> list[Measured]:
    """Return the runs of a run folder (one) or of a YAML table (several).

    Raises:
        DataError: if nothing measured is found there.
    """
    if path.is_dir():
        return [_run_folder(path)]
    if not path.is_file():
        raise DataError(f"{path} is neither a run folder nor a table of measured runs")
    table = yaml.safe_load(path.read_text())
    if not isinstance(table, dict) or not table.get("rows"):
        raise DataError(f"{path}: expected a mapping with 'rows' (see configs/calibration)")
    return [_published({**table.get("defaults", {}), **row}, path) for row in table["rows"]]


def _run_folder(folder: Path) -> Measured:
    config_file, metrics = folder / "config.yaml", folder / "metrics.jsonl"
    if not config_file.is_file() or not metrics.is_file():
        raise DataError(f"{folder} is no run folder: config.yaml or metrics.jsonl is missing")
    config = load_config(config_file)
    lines = [json.loads(line) for line in metrics.read_text().splitlines() if line.strip()]
    seconds = [line["seconds_per_step"] for line in lines if "seconds_per_step" in line]
    if len(seconds) < 3:
        raise DataError(
            f"{metrics} has {len(seconds)} timed lines; at least 3 are needed (train.log_every_steps)"
        )
    # The first line holds start-up costs.
    return Measured(
        str(folder), Job(config, _num_ranks(folder, config)), statistics.median(seconds[1:])
    )


def _num_ranks(folder: Path, config: RunConfig) -> int:
    """Return the ranks of the run: what it recorded, or what the configuration starts."""
    path = folder / "run.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    return int(found.get("num_ranks") or config.parallel.local_ranks)


def _published(row: dict[str, Any], path: Path) -> Measured:
    try:
        job = Job(_config(row), row["gpus"])
        flops = model_flops_per_step(
            job.config.model,
            job.config.objective,
            sequence_length=row["sequence"],
            rows=row["batch"],
        )
        counted = flops.training_full_attention if row["attention"] == "full" else flops.training
        return Measured(row["name"], job, counted / (row["tflops"] * 1e12 * row["gpus"]))
    except KeyError as error:
        raise ConfigError(f"{path}: row {row.get('name', row)} lacks {error}") from None


def _config(row: dict[str, Any]) -> RunConfig:
    layers, stages = row["layers"], row["pipeline"]
    each = layers // stages if layers % stages == 0 else (layers + 2) // stages
    return RunConfig(
        model=ModelConfig(
            hidden_size=row["hidden"],
            num_layers=layers,
            num_heads=row["heads"],
            num_kv_heads=row["kv"],
            ffn_size=row["ffn"],
            vocab_size=row["vocab"],
            activation=row["activation"],
            max_length=row["sequence"],
        ),
        objective=ObjectiveConfig(name="ar"),
        train=TrainConfig(
            sequence_length=row["sequence"],
            global_batch_rows=row["batch"],
            micro_batch_rows=row.get("micro_batch", 1),
            steps=1000,
        ),
        parallel=ParallelConfig(
            tensor=row["tensor"],
            pipeline=stages,
            # Unpublished: as many chunks as a stage has layers, the least bubble.
            virtual_pipeline=row["virtual_pipeline"] or (each if stages > 1 else 1),
            context=row["context"],
        ),
        precision=PrecisionConfig(dtype="bf16", fp8="tensorwise" if row["fp8"] else "off"),
    )
