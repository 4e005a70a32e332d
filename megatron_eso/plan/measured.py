"""Reads measured runs: run folders of the trainer, results of its benchmark, and tables.

A row of a table has either ``settings`` of this trainer and ``tokens_per_second``, as the benchmark's
results have, or the shape, layout and TFLOP/s per GPU that others have published.
"""

import statistics
from collections.abc import Iterator
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
from megatron_eso.files import read_json, read_json_lines
from megatron_eso.plan.calibrate import Measured
from megatron_eso.plan.flops import model_flops_per_step
from megatron_eso.plan.job import Job


def read_measured(path: Path) -> list[Measured]:
    """Return the measured run of a run folder, or those of a YAML table or of a benchmark's results.

    Raises:
        DataError: if nothing measured is found there.
    """
    if path.is_dir():
        return [_run_folder(path)]
    if not path.is_file():
        raise DataError(f"{path} is neither a run folder nor a table of measured runs")
    try:
        table: Any = yaml.safe_load(path.read_text())  # JSON is YAML
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if isinstance(table, list):
        table = {"rows": [row for row in table if isinstance(row, dict) and "settings" in row]}
    if not isinstance(table, dict) or not table.get("rows"):
        raise DataError(
            f"{path}: expected a mapping with 'rows' (see configs/calibration), or results of "
            "tools.bench_gpu with whole steps"
        )
    if not all(isinstance(row, dict) for row in table["rows"]):
        raise DataError(f"{path}: every row must be a mapping (see configs/calibration)")
    rows = [{**table.get("defaults", {}), **row} for row in table["rows"]]
    return [_of_trainer(row, path) if "settings" in row else _published(row, path) for row in rows]


def _run_folder(folder: Path) -> Measured:
    config_file, metrics = folder / "config.yaml", folder / "metrics.jsonl"
    if not config_file.is_file() or not metrics.is_file():
        raise DataError(f"{folder} is not a run folder: config.yaml or metrics.jsonl is missing")
    config = load_config(config_file)
    lines = read_json_lines(metrics)
    seconds = [line["seconds_per_step"] for line in lines if "seconds_per_step" in line]
    if len(seconds) < 3:
        raise DataError(
            f"{metrics} has {len(seconds)} timed lines, but at least 3 are needed (train.log_every_steps)"
        )
    # The first line holds start-up costs.
    return Measured(
        str(folder), Job(config, _num_ranks(folder, config)), statistics.median(seconds[1:])
    )


def _num_ranks(folder: Path, config: RunConfig) -> int:
    """Return the ranks of the run: those it recorded, or else those that the configuration starts."""
    path = folder / "run.json"
    if not path.is_file():
        return config.parallel.local_ranks
    number = read_json(path).get("num_ranks")
    if not isinstance(number, int) or number < 1:
        raise DataError(
            f"{path} is damaged: it does not say the number of ranks, so how fast each one was is unknown"
        )
    return number


def _of_trainer(row: dict[str, Any], path: Path) -> Measured:
    name = row.get("name") or row.get("what")
    speed, settings = row.get("tokens_per_second"), [str(x) for x in _flat(row["settings"])]
    if not isinstance(name, str) or not isinstance(speed, (int, float)) or not speed > 0:
        raise ConfigError(f"{path}: row {name or row} needs a name and tokens_per_second > 0")
    config = load_config(None, ["train.steps=1", *settings])
    tokens = config.train.global_batch_rows * config.train.sequence_length
    return Measured(name, Job(config, row.get("gpus", 1)), tokens / speed)


def _flat(settings: list[Any]) -> Iterator[Any]:
    """Yield the settings of a list and of lists inside it: rows share parts through YAML's aliases."""
    for setting in settings:
        yield from _flat(setting) if isinstance(setting, list) else (setting,)


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
            # If unpublished: as many chunks as a stage has layers, which gives the smallest bubble.
            virtual_pipeline=row["virtual_pipeline"] or (each if stages > 1 else 1),
            context=row["context"],
        ),
        precision=PrecisionConfig(dtype="bf16", fp8="tensorwise" if row["fp8"] else "off"),
    )
