"""The settings of a scaling study, one field a key of its file."""

import math
from dataclasses import dataclass, field
from typing import Literal

from megatron_eso.config.ranges import within
from megatron_eso.config.schema import ObjectiveConfig


@dataclass(frozen=True)
class LearningRateRule:
    """Peak learning rate = reference x (N / reference_parameters) ^ exponent.

    N is a model's number of weights without embedding and head.
    """

    reference: float = within(3e-4, above=0)
    """Peak rate at N = ``reference_parameters``."""
    reference_parameters: float = within(1e8, above=0, below=math.inf)
    """N at which ``reference`` holds."""
    exponent: float = 0.0
    """0: the same rate for all sizes; negative: lower rates for larger models."""


@dataclass(frozen=True)
class SweepConfig:
    """A scaling study: one run for each objective, model and budget (or level of a token ladder)."""

    name: str = "sweep"
    """Name of the study; the default ``folder`` holds it."""
    folder: str = "runs/${name}"
    """Folder of cells and tables, relative to where the command runs."""
    base: str = ""
    """Run configuration that all cells share, relative to the sweep file."""
    models: list[str] = field(default_factory=list)
    """Configuration files with a ``model`` section, relative to the sweep file."""
    objectives: list[ObjectiveConfig] = field(default_factory=list)
    """Objectives to compare."""
    budgets: list[float] = field(default_factory=list)
    """Training FLOPs of a run, by ``flops_convention``. Give these or ``tokens_per_parameter``."""
    tokens_per_parameter: list[float] = field(default_factory=list)
    """Levels of a token ladder: data tokens per weight, embedding and head not counted."""
    flops_convention: Literal["honest", "published"] = "honest"
    """honest: what this trainer computes; published: as arXiv 2602.15014, without attention scores."""
    learning_rate: LearningRateRule = field(default_factory=LearningRateRule)
    """Rule for optimizer.learning_rate, rounded to four significant digits."""
    min_learning_rate_share: float = within(0.1, at_least=0, at_most=1)
    """optimizer.min_learning_rate as a share of the peak; without effect at the base's
    optimizer.schedule=constant, which has no decay."""
    warmup_share: float = within(0.05, at_least=0, at_most=1)
    """optimizer.warmup_steps as a share of the steps, rounded up; never all steps."""
    batch_rows: int | None = within(None, at_least=1)
    """train.global_batch_rows of every cell; null: that of the base."""
    min_tokens_per_parameter: float = within(0.0, at_least=0)
    """Cells with fewer data tokens per weight (embedding and head not counted) are not run."""
    hardware: str = "h100"
    """Hardware profile that times and costs are estimated for: a name or a file."""
    num_gpus: int = within(8, at_least=1)
    """GPUs of one machine that a cell trains on, a rank each: its parallel.local_ranks."""
