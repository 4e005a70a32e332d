"""Rules between settings. Every violation is reported at once, with the numbers and what to change.

A rule is a generator of messages; :func:`violations` runs them all. Rules that need the number of
ranks are left out when it is not known yet.
"""

from collections.abc import Iterator

from megatron_eso.config import derive
from megatron_eso.config.precision_rules import broken
from megatron_eso.config.precision_table import SETTINGS_RULES
from megatron_eso.config.schema import OptimizerConfig, RunConfig
from megatron_eso.errors import ConfigError

# Bounds of single settings, null apart, and what may have been meant by a value beyond them.
_AT_LEAST = {
    0: ("optimizer.warmup_steps", "optimizer.weight_decay", "optimizer.clip_grad_norm",
        "eval.likelihood_orders", "resilience.max_restarts_without_progress", "resilience.spike_window",
        "resilience.max_skipped_steps", "resilience.straggler_every_steps", "data.num_workers",
        "data.prefetch_shards"),
    1: ("train.eval_every_steps", "train.save_every_steps", "optimizer.decay_steps", "eval.num_rows",
        "eval.micro_batch_rows", "eval.nelbo_repeats", "checkpoint.keep_last",
        "checkpoint.local_every_steps", "checkpoint.keep_every_steps", "data.retries",
        "data.shuffle_block_size", "data.shuffle_canonical_nodes"),
}  # fmt: skip
_POSITIVE = ("optimizer.learning_rate", "optimizer.eps", "resilience.setup_timeout_seconds",
             "resilience.min_timeout_seconds", "resilience.spike_deviations", "checkpoint.timeout_seconds",
             "data.timeout_seconds", "data.cache_limit_gib")  # fmt: skip
_MEANT = {
    "train.eval_every_steps": "null evaluates only at the end",
    "train.save_every_steps": "null saves only at the end and on a signal",
    "optimizer.decay_steps": "null takes the default, schedule=constant has no decay",
    "optimizer.clip_grad_norm": "0 sets no bound",
    "eval.micro_batch_rows": "null takes train.micro_batch_rows",
    "checkpoint.keep_every_steps": "null keeps no milestones",
    "data.cache_limit_gib": "null sets no bound",
}


def check(config: RunConfig, world_size: int | None = None) -> None:
    """Raise a :class:`ConfigError` that lists every violation; return nothing if there is none."""
    found = violations(config, world_size)
    if found:
        raise ConfigError(
            f"{len(found)} setting(s) do not fit:\n" + "\n".join(f"  - {line}" for line in found)
        )


def check_layout(config: RunConfig, world_size: int) -> None:
    """Raise a :class:`ConfigError` unless the model can be spread over the ranks as the layout says.

    For what loads a model without training it: the rules of batches do not matter there.
    """
    parallel = config.parallel
    found = list(_layout(config))
    replica = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % replica:
        found.append(
            f"{world_size} rank(s) are no multiple of tensor x pipeline x context = {parallel.tensor} x "
            f"{parallel.pipeline} x {parallel.context} = {replica} (--ranks)"
        )
    if found:
        raise ConfigError(
            "this layout does not fit the model:\n" + "\n".join(f"  - {line}" for line in found)
        )


def violations(config: RunConfig, world_size: int | None = None) -> list[str]:
    """Return one message per broken rule."""
    rules = (
        _model,
        _objective,
        _length,
        _layout,
        _optimizer,
        _precision,
        _evaluation,
        _baselines,
        _resilience,
        _data,
    )
    found = [message for rule in rules for message in rule(config)]
    if world_size is not None:
        found += _world(config, world_size)
    return found


def wsd_decay_steps(optimizer: OptimizerConfig, total_steps: int) -> int:
    """Return the length of the decay at the end of the wsd schedule."""
    return optimizer.decay_steps or max(total_steps // 10, 1)


def _model(config: RunConfig) -> Iterator[str]:
    model = config.model
    for name in ("hidden_size", "num_layers", "num_heads", "vocab_size", "max_length"):
        if getattr(model, name) < 1:
            yield f"model.{name}={getattr(model, name)} must be at least 1"
            return
    if model.head_size is None and model.hidden_size % model.num_heads:
        yield (
            f"model.hidden_size={model.hidden_size} is not divisible by model.num_heads="
            f"{model.num_heads}; change one of them or set model.head_size"
        )
    if derive.head_size(model) % 2:
        yield (
            f"the head size {derive.head_size(model)} is odd; rotary positions need an even one "
            "(model.head_size or model.num_heads)"
        )
    kv_heads = derive.num_kv_heads(model)
    if kv_heads < 1 or model.num_heads % kv_heads:
        yield f"model.num_heads={model.num_heads} is not a multiple of model.num_kv_heads={kv_heads}"
    if model.vocab_size < 3:
        yield f"model.vocab_size={model.vocab_size} must hold two tokens and the mask token"
    if not 0 <= model.dropout < 1:
        yield f"model.dropout={model.dropout} must be in [0, 1)"
    if model.head_bias and model.tie_embeddings:
        yield "model.head_bias and model.tie_embeddings exclude each other"


def _objective(config: RunConfig) -> Iterator[str]:
    objective = config.objective
    if not 0 <= objective.alpha_0 <= 1:
        yield f"objective.alpha_0={objective.alpha_0} must be in [0, 1]"
        return
    if not 0 <= objective.noise_eps < 1:
        yield f"objective.noise_eps={objective.noise_eps} must be in [0, 1)"
    if objective.name == "eso":
        yield from _eso(config)


def _eso(config: RunConfig) -> Iterator[str]:
    objective, rows = config.objective, config.train.global_batch_rows
    fraction = derive.diffusion_fraction(objective)
    if objective.loss_weight == "constant" and objective.alpha_0 < 1:
        yield (
            f"objective.loss_weight=constant with objective.alpha_0={objective.alpha_0} would break the "
            "balance of the two losses; use loss_weight=elbo or alpha_0=1"
        )
    if objective.alpha_0 in (0.0, 1.0) and fraction != objective.alpha_0:
        yield (
            f"objective.diffusion_fraction={fraction} with objective.alpha_0={objective.alpha_0}: "
            f"at this end every row takes one pass, so it must be {objective.alpha_0:g} (or null)"
        )
    elif not 0 <= fraction <= 1 or (0 < objective.alpha_0 < 1 and fraction in (0.0, 1.0)):
        yield f"objective.diffusion_fraction={fraction} must be strictly between 0 and 1"
    exact = rows * fraction
    if abs(exact - round(exact)) > 1e-9:
        yield (
            f"objective.diffusion_fraction={fraction} splits train.global_batch_rows={rows} at "
            f"{exact:g} rows; choose numbers that give a whole row count"
        )
    elif 0 < fraction < 1 and round(exact) % 2:
        yield (
            f"{round(exact)} diffusion rows in a global batch of {rows}: must be even, because a slot "
            "holds two diffusion rows or one sequential row with its mask copies "
            "(train.global_batch_rows)"
        )
    if fraction < 1 and config.train.micro_batch_rows % 2:
        yield (
            f"train.micro_batch_rows={config.train.micro_batch_rows} must be even: a sequential row "
            "runs as two stack rows in one micro-batch"
        )


def _length(config: RunConfig) -> Iterator[str]:
    train, model = config.train, config.model
    for name in ("sequence_length", "global_batch_rows", "micro_batch_rows", "log_every_steps"):
        if getattr(train, name) < 1:
            yield f"train.{name}={getattr(train, name)} must be at least 1"
            return
    yield from _bounds(config, "train")
    if train.sequence_length > model.max_length:
        yield (
            f"train.sequence_length={train.sequence_length} is longer than the rotary table "
            f"(model.max_length={model.max_length}); raise model.max_length"
        )
    if (train.steps is None) == (train.tokens is None):
        yield f"set exactly one of train.steps={train.steps} and train.tokens={train.tokens}"
    batch_tokens = train.global_batch_rows * train.sequence_length
    if train.steps is None and train.tokens is not None and train.tokens % batch_tokens:
        near = train.tokens // batch_tokens * batch_tokens
        yield (
            f"train.tokens={train.tokens} is not a multiple of one global batch ({batch_tokens} tokens); "
            f"the nearest below is {near}"
        )
    if derive.total_steps(config) < 1:
        yield "the run has no step; set train.steps or train.tokens"


def _layout(config: RunConfig) -> Iterator[str]:
    model, parallel, train = config.model, config.parallel, config.train
    for name in ("tensor", "pipeline", "virtual_pipeline", "context", "local_ranks"):
        if getattr(parallel, name) < 1:
            yield f"parallel.{name}={getattr(parallel, name)} must be at least 1"
            return
    divisions = {
        "model.num_heads": model.num_heads,
        "model.num_kv_heads": derive.num_kv_heads(model),
        "the MLP width (model.ffn_size)": derive.ffn_size(model),
        "the padded vocabulary (model.vocab_padding_multiple)": derive.padded_vocab_size(model),
    }
    for what, number in divisions.items():
        if number % parallel.tensor:
            yield f"{what} = {number} is not divisible by parallel.tensor={parallel.tensor}"
    if train.sequence_length % parallel.context:
        yield (
            f"train.sequence_length={train.sequence_length} is not divisible by parallel.context="
            f"{parallel.context}; change one of them"
        )
    elif parallel.sequence and train.sequence_length % (parallel.tensor * parallel.context):
        yield (
            f"train.sequence_length={train.sequence_length} is not divisible by parallel.tensor x "
            f"parallel.context = {parallel.tensor} x {parallel.context}; set parallel.sequence=false or "
            "change the length"
        )
    chunks = parallel.pipeline * parallel.virtual_pipeline
    if model.num_layers % chunks:
        yield (
            f"model.num_layers={model.num_layers} is not divisible by pipeline x virtual_pipeline = "
            f"{parallel.pipeline} x {parallel.virtual_pipeline}"
        )
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        yield "parallel.virtual_pipeline > 1 needs parallel.pipeline > 1"
    yield from _heads_of_context_ranks(config)
    yield from _cuda_graphs(config)


def _cuda_graphs(config: RunConfig) -> Iterator[str]:
    """A graph repeats the same kernels on the same addresses."""
    if not config.parallel.cuda_graphs:
        return
    unfit = {
        f"model.dropout={config.model.dropout} draws new numbers in every pass; set it to 0": (
            config.model.dropout > 0
        ),
        f"parallel.recompute={config.parallel.recompute} runs passes again that a graph has fixed; set it "
        "to none": config.parallel.recompute != "none",
        f"precision.fp8={config.precision.fp8} keeps its scales by code that a graph leaves out; set it to "
        "off": config.precision.fp8 != "off",
        f"objective.name={config.objective.name} has another mask in rows with padding; use eso or ar": (
            config.objective.name in ("mdlm", "bd3lm")
        ),
    }
    for why, is_so in unfit.items():
        if is_so:
            yield f"parallel.cuda_graphs=true: {why}, or set parallel.cuda_graphs=false"


def _heads_of_context_ranks(config: RunConfig) -> Iterator[str]:
    """Context ranks share the attention heads of their tensor rank."""
    model, parallel = config.model, config.parallel
    ranks, kv_heads = parallel.tensor * parallel.context, derive.num_kv_heads(model)
    if parallel.context == 1 or kv_heads % parallel.tensor:
        return
    if model.num_heads % ranks:
        yield (
            f"model.num_heads={model.num_heads} is not divisible by parallel.tensor x parallel.context = "
            f"{parallel.tensor} x {parallel.context}: context ranks share the heads of a tensor rank; "
            "lower parallel.context"
        )
    elif kv_heads % ranks and ranks % kv_heads:
        yield (
            f"model.num_kv_heads={kv_heads} is neither a multiple nor a divisor of parallel.tensor x "
            f"parallel.context = {parallel.tensor} x {parallel.context}; change parallel.context"
        )


def _world(config: RunConfig, world_size: int) -> Iterator[str]:
    parallel, train = config.parallel, config.train
    replica = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % replica:
        yield (
            f"{world_size} rank(s) cannot hold copies of the model on tensor x pipeline x context = "
            f"{parallel.tensor} x {parallel.pipeline} x {parallel.context} = {replica} ranks; start a "
            "multiple of that (--ranks, parallel.local_ranks, nodes) or change the layout"
        )
        return
    numbers = derive.derive(config, world_size)
    per_round = train.micro_batch_rows * numbers.data_parallel
    if numbers.num_stack_rows % per_round:
        yield (
            f"{numbers.num_stack_rows} stack rows (train.global_batch_rows={train.global_batch_rows}, "
            f"objective {config.objective.name}) do not divide into micro-batches of "
            f"train.micro_batch_rows={train.micro_batch_rows} on {numbers.data_parallel} data-parallel "
            f"rank(s): must be a multiple of {per_round}"
        )
    elif parallel.virtual_pipeline > 1 and numbers.num_micro_batches % parallel.pipeline:
        yield (
            f"{numbers.num_micro_batches} micro-batches are not a multiple of parallel.pipeline="
            f"{parallel.pipeline}, which the interleaved schedule needs; change "
            "train.micro_batch_rows or train.global_batch_rows"
        )


def _optimizer(config: RunConfig) -> Iterator[str]:
    optimizer = config.optimizer
    yield from _bounds(config, "optimizer")
    if not 0 <= optimizer.min_learning_rate <= optimizer.learning_rate:
        yield (
            f"optimizer.min_learning_rate={optimizer.min_learning_rate} must be between 0 and "
            f"optimizer.learning_rate={optimizer.learning_rate}"
        )
    for name in ("beta1", "beta2", "ema_decay"):
        if not 0 <= getattr(optimizer, name) < 1:
            yield f"optimizer.{name}={getattr(optimizer, name)} must be in [0, 1)"
    steps = derive.total_steps(config)
    decay, how = optimizer.decay_steps or 0, ""
    if optimizer.schedule == "wsd" and optimizer.decay_steps is None:
        decay = wsd_decay_steps(optimizer, steps)
        how = f" (wsd: a tenth, {decay})"
    if optimizer.warmup_steps + decay > steps > 0:
        yield (
            f"optimizer.warmup_steps={optimizer.warmup_steps} and optimizer.decay_steps="
            f"{optimizer.decay_steps}{how} are more than the run's {steps} steps"
        )


def _precision(config: RunConfig) -> Iterator[str]:
    precision = config.precision
    if precision.deterministic and precision.attention == "flex":
        yield (
            "precision.deterministic=true with precision.attention=flex: PyTorch does not say that "
            "FlexAttention's gradients are repeatable; use split (or auto)"
        )
    parallel, model = config.parallel, config.model
    if min(parallel.tensor, parallel.pipeline, parallel.context, model.num_heads) < 1:
        return  # said by other rules
    yield from broken(SETTINGS_RULES, config)


def check_evaluation(config: RunConfig) -> None:
    """Raise a :class:`ConfigError` that lists every violation of the ``eval`` settings' rules.

    For what scores a model without training it: the rules of training batches do not matter there.
    """
    found = list(_evaluation(config))
    if found:
        raise ConfigError(
            "these evaluation settings do not fit:\n" + "\n".join(f"  - {line}" for line in found)
        )


def _evaluation(config: RunConfig) -> Iterator[str]:
    yield from _bounds(config, "eval")
    if not 0 <= config.eval.noise_eps < 1:
        yield f"eval.noise_eps={config.eval.noise_eps} must be in [0, 1)"
    if config.eval.alpha_0 is not None and not 0 <= config.eval.alpha_0 <= 1:
        yield f"eval.alpha_0={config.eval.alpha_0} must be in [0, 1]"


def _baselines(config: RunConfig) -> Iterator[str]:
    objective, train = config.objective, config.train
    if objective.name != "bd3lm":
        return
    if train.sequence_length % objective.block_size:
        yield (
            f"objective.block_size={objective.block_size} does not divide train.sequence_length="
            f"{train.sequence_length}"
        )
    if train.micro_batch_rows % 2:
        yield "train.micro_batch_rows must be even for bd3lm: a row runs as two stack rows"


def _resilience(config: RunConfig) -> Iterator[str]:
    settings = config.resilience
    yield from _bounds(config, "resilience", "checkpoint")
    if settings.timeout_factor < 1:
        yield (
            f"resilience.timeout_factor={settings.timeout_factor} must be at least 1: a step may take as "
            "long as the longest so far"
        )
    if (
        "rollback" in (settings.on_nonfinite, settings.on_spike)
        and not config.train.save_every_steps
    ):
        yield "resilience.on_...=rollback goes back to a checkpoint: set train.save_every_steps"


def _data(config: RunConfig) -> Iterator[str]:
    yield from _bounds(config, "data")


def _bounds(config: RunConfig, *sections: str) -> Iterator[str]:
    """Yield a message for each setting of these sections that is beyond its bound."""
    least = [(name, bound) for bound, names in _AT_LEAST.items() for name in names]
    for name, bound in [*least, *((name, None) for name in _POSITIVE)]:
        section, key = name.split(".")
        value = getattr(getattr(config, section), key)
        if section not in sections or value is None:
            continue
        if not (value > 0 if bound is None else value >= bound):
            asked = "positive" if bound is None else f"at least {bound}"
            hint = f"; {_MEANT[name]}" if name in _MEANT else ""
            yield f"{name}={value} must be {asked}{hint}"
