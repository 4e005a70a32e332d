"""The settings of a scaling study."""

import math
from dataclasses import dataclass, field
from typing import Literal

from megatron_eso.config.ranges import within
from megatron_eso.config.schema import ObjectiveConfig


@dataclass(frozen=True)
class LearningRateRule:
    """Peak rate = reference x (parameters / reference_parameters) ^ exponent."""

    reference: float = within(3e-4, above=0)
    """Rate of a model of ``reference_parameters`` weights."""
    reference_parameters: float = within(1e8, above=0, below=math.inf)
    """Size at which ``reference`` holds, embeddings not counted."""
    exponent: float = 0.0
    """0: the same rate for all sizes."""


@dataclass(frozen=True)
class SweepConfig:
    """A scaling study."""

    name: str = "sweep"
    """Name of the study."""
    folder: str = "runs/${name}"
    """Folder of cells, tables and reports."""
    base: str = ""
    """Run configuration that all cells share, relative to the sweep file."""
    models: list[str] = field(default_factory=list)
    """Configuration files with a ``model`` section, relative to the sweep file."""
    objectives: list[ObjectiveConfig] = field(default_factory=list)
    """Objectives to compare."""
    budgets: list[float] = field(default_factory=list)
    """Training FLOPs, by ``flops_convention``; excludes ``tokens_per_parameter``."""
    tokens_per_parameter: list[float] = field(default_factory=list)
    """Token ladders: data tokens over parameters without embeddings."""
    flops_convention: Literal["honest", "published"] = "honest"
    """honest: attention and head as computed; published: arXiv 2602.15014's counter, without scores."""
    learning_rate: LearningRateRule = field(default_factory=LearningRateRule)
    """Rule for optimizer.learning_rate."""
    min_learning_rate_share: float = within(0.1, at_least=0, at_most=1)
    """optimizer.min_learning_rate as a share of the peak; without effect at the base's
    optimizer.schedule=constant, which has no decay."""
    warmup_share: float = within(0.05, at_least=0, at_most=1)
    """optimizer.warmup_steps as a share of the steps, rounded up."""
    batch_rows: int | None = within(None, at_least=1)
    """train.global_batch_rows of every cell; null: the base's."""
    min_tokens_per_parameter: float = within(0.0, at_least=0)
    """Cells with fewer tokens over parameters (embeddings not counted) are left out."""
    hardware: str = "h100"
    """Hardware profile for the estimate of cost."""
    num_gpus: int = within(8, at_least=1)
    """GPUs (ranks) of one machine that a cell trains on: its parallel.local_ranks."""
