"""Numbers that follow from the configuration, each with the rule that gives it.

Nothing here changes the configuration; the trainer prints ``derive(...).lines()`` at start.
A *slot* is two stack rows: two diffusion rows, or one sequential row with its mask copies.
"""

import math
from dataclasses import dataclass, replace

from megatron_eso.config.schema import (
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
)


@dataclass(frozen=True)
class Derived:
    """Derived settings of a run on ``world_size`` ranks."""

    head_size: int
    num_kv_heads: int
    ffn_size: int
    padded_vocab_size: int
    diffusion_fraction: float
    data_parallel: int
    num_diffusion_rows: int
    num_sequential_rows: int
    num_stack_rows: int
    num_micro_batches: int
    total_steps: int
    total_tokens: int
    rules: dict[str, str]

    def lines(self) -> list[str]:
        """Return one line per derived setting: name, value, rule."""
        return [f"{name} = {getattr(self, name)}  ({rule})" for name, rule in self.rules.items()]


def derive(config: RunConfig, world_size: int) -> Derived:
    """Return the derived settings of a configuration that :func:`check` accepts.

    Args:
        config: the run.
        world_size: number of ranks.
    """
    model, train, parallel = config.model, config.train, config.parallel
    num_ranks_of_one_replica = parallel.tensor * parallel.pipeline * parallel.context
    data_parallel = world_size // num_ranks_of_one_replica
    diffusion_rows = num_diffusion_rows(config)
    sequential_rows = train.global_batch_rows - diffusion_rows
    stack_rows = diffusion_rows + 2 * sequential_rows
    if config.objective.name == "bd3lm":
        diffusion_rows, sequential_rows = 0, train.global_batch_rows
        stack_rows = 2 * train.global_batch_rows
    steps = total_steps(config)
    rules = {
        "head_size": "model.head_size, or hidden_size / num_heads",
        "num_kv_heads": "model.num_kv_heads, or num_heads",
        "ffn_size": "model.ffn_size, or 8/3 hidden_size rounded up to a multiple of 64 (swiglu), 4 "
        "hidden_size (gelu)",
        "padded_vocab_size": f"vocab_size rounded up to a multiple of {model.vocab_padding_multiple}",
        "diffusion_fraction": "objective.diffusion_fraction, or 0 / 0.5 / 1 by alpha_0",
        "data_parallel": f"{world_size} ranks / (tensor x pipeline x context = "
        f"{num_ranks_of_one_replica})",
        "num_diffusion_rows": "diffusion_fraction x global_batch_rows",
        "num_sequential_rows": "the other rows of the global batch",
        "num_stack_rows": "diffusion rows + 2 x sequential rows (true tokens and mask copies)",
        "num_micro_batches": "stack rows / (micro_batch_rows x data_parallel)",
        "total_steps": "train.steps, or train.tokens / (global_batch_rows x sequence_length)",
        "total_tokens": "total_steps x global_batch_rows x sequence_length",
    } | _rules_of_baseline(config.objective.name)
    return Derived(
        head_size=head_size(model),
        num_kv_heads=num_kv_heads(model),
        ffn_size=ffn_size(model),
        padded_vocab_size=padded_vocab_size(model),
        diffusion_fraction=diffusion_fraction(config.objective),
        data_parallel=data_parallel,
        num_diffusion_rows=diffusion_rows,
        num_sequential_rows=sequential_rows,
        num_stack_rows=stack_rows,
        num_micro_batches=stack_rows // (train.micro_batch_rows * data_parallel),
        total_steps=steps,
        total_tokens=steps * train.global_batch_rows * train.sequence_length,
        rules=rules,
    )


def _rules_of_baseline(name: str) -> dict[str, str]:
    """Return the rules that differ from Eso-LM's."""
    if name == "eso":
        return {}
    rules = {"diffusion_fraction": f"objective.name={name}: all rows take the same pass"}
    if name == "bd3lm":
        rules["num_diffusion_rows"] = "objective.name=bd3lm: every row runs as two stack rows"
    return rules


def head_size(model: ModelConfig) -> int:
    """Return the width of one attention head."""
    return model.head_size or model.hidden_size // model.num_heads


def num_kv_heads(model: ModelConfig) -> int:
    """Return the number of key/value heads."""
    return model.num_kv_heads or model.num_heads


def ffn_size(model: ModelConfig) -> int:
    """Return the inner width of the MLP."""
    if model.ffn_size is not None:
        return model.ffn_size
    if model.activation == "gelu":
        return 4 * model.hidden_size
    return 64 * math.ceil(8 * model.hidden_size / 3 / 64)


def with_sizes(model: ModelConfig) -> ModelConfig:
    """Return the model with every size filled in that otherwise follows from other settings."""
    return replace(
        model,
        head_size=head_size(model),
        num_kv_heads=num_kv_heads(model),
        ffn_size=ffn_size(model),
    )


def padded_vocab_size(model: ModelConfig) -> int:
    """Return the number of rows of the embedding and of the head."""
    multiple = model.vocab_padding_multiple
    return multiple * math.ceil(model.vocab_size / multiple)


def diffusion_fraction(objective: ObjectiveConfig) -> float:
    """Return the share of rows that take the diffusion pass (kappa of the paper)."""
    if objective.name in ("mdlm", "ar", "bd3lm"):
        return 1.0
    if objective.diffusion_fraction is not None:
        return objective.diffusion_fraction
    return {0.0: 0.0, 1.0: 1.0}.get(objective.alpha_0, 0.5)


def nelbo_stack_rows(objective: ObjectiveConfig) -> int:
    """Return the stack rows of one row in the NELBO: a row takes every pass it may take in training."""
    if objective.name == "bd3lm":
        return 2
    alpha_0 = objective.alpha_0 if objective.name == "eso" else 1.0
    return (1 if alpha_0 > 0 else 0) + (2 if alpha_0 < 1 else 0)


def has_user_buffers(parallel: ParallelConfig, precision: PrecisionConfig) -> bool:
    """Return whether layers exchange data through Transformer Engine's user buffers.

    ``precision.backend`` must already be resolved.
    """
    return parallel.tensor_overlap and precision.backend == "te"


def fixed_stack_rows(config: RunConfig) -> int | None:
    """Return the stack rows that every micro-batch must have, also in evaluation; None: any number."""
    is_fixed = has_user_buffers(config.parallel, config.precision)
    return config.train.micro_batch_rows if is_fixed else None


def num_diffusion_rows(config: RunConfig) -> int:
    """Return how many rows of the global batch run through the stack once."""
    return round(diffusion_fraction(config.objective) * config.train.global_batch_rows)


def total_steps(config: RunConfig) -> int:
    """Return the number of optimizer steps of the run."""
    if config.train.steps is not None:
        return config.train.steps
    tokens = config.train.tokens or 0
    return tokens // (config.train.global_batch_rows * config.train.sequence_length)


def wsd_decay_steps(optimizer: OptimizerConfig, total_steps: int) -> int:
    """Return the length of the decay at the end of the wsd schedule."""
    return optimizer.decay_steps or max(total_steps // 10, 1)


def waiting_seconds(config: RunConfig) -> float:
    """Return how long a rank waits for others in a collective before it gives up.

    This must exceed the time that one of them may take alone, or NCCL's watchdog (likewise gloo's timeout)
    ends a run that the settings allow to continue. It must also exceed the launcher's limit, because the
    launcher shows where every rank stands.
    """
    resilience, checkpoint = config.resilience, config.checkpoint
    allowed = [600.0, resilience.setup_timeout_seconds, resilience.min_timeout_seconds]
    if not checkpoint.asynchronous:
        allowed.append(checkpoint.timeout_seconds)  # ranks that have written wait for the last one
    return max(allowed) + 60.0
