"""Rules between settings. All violations are reported together, with the numbers and what to change.

A rule is a generator of messages; :func:`violations` runs all rules. A rule runs only if every setting
of the sections it reads is within its range (declared in ``schema.py``), and may rely on that. Rules
that need the number of ranks are skipped while it is unknown.
"""

from collections.abc import Callable, Iterator

from megatron_eso.config import derive
from megatron_eso.config.precision_rules import broken
from megatron_eso.config.precision_table import SETTINGS_RULES
from megatron_eso.config.ranges import out_of_range
from megatron_eso.config.schema import RunConfig
from megatron_eso.errors import ConfigError


def check(config: RunConfig, world_size: int | None = None) -> None:
    """Raise a :class:`ConfigError` that lists every violation, if there is any."""
    _refuse(violations(config, world_size))


def check_start(config: RunConfig, world_size: int) -> None:
    """Do what :func:`check` does, and also refuse a run without data; for a run about to start."""
    found = violations(config, world_size)
    if not config.data.sources:
        found.append(
            "data.sources is empty: name at least one prepared split, [{path: DATA/train}]"
        )
    _refuse(found)


def check_layout(config: RunConfig, world_size: int) -> None:
    """Raise a :class:`ConfigError` unless the layout can spread the model over the ranks.

    For commands that load a model without training it: the rules for batches do not matter there.
    """
    parallel = config.parallel
    found, wrong = _beyond_ranges(config, _RULES[_layout])
    if not wrong:
        found += [*_layout(config), *_cuda_graphs(config)]
        replica = parallel.tensor * parallel.pipeline * parallel.context
        if world_size % replica:
            found.append(
                f"{world_size} rank(s) are not a multiple of tensor x pipeline x context = "
                f"{parallel.tensor} x {parallel.pipeline} x {parallel.context} = {replica}; change --ranks"
            )
    if found:
        raise ConfigError(
            "this layout does not fit the model:\n" + "\n".join(f"  - {line}" for line in found)
        )


def check_length(config: RunConfig) -> None:
    """Raise a :class:`ConfigError` unless the settings say how many rows the run reads; see `data mix`."""
    check_ranges(config, "data", "train")
    _refuse(list(_length(config)))


def check_ranges(config: RunConfig, *sections: str) -> None:
    """Raise a :class:`ConfigError` that lists the settings of some sections outside their ranges.

    For commands that do not train: the rules for training batches and layouts do not matter there.
    """
    found, _ = _beyond_ranges(config, sections)
    if found:
        raise ConfigError("these settings do not fit:\n" + "\n".join(f"  - {f}" for f in found))


def violations(config: RunConfig, world_size: int | None = None) -> list[str]:
    """Return one message per setting outside its range and per broken rule."""
    found, wrong = _beyond_ranges(config)
    for rule, sections in _RULES.items():
        if not wrong.intersection(sections):
            found += rule(config)
    if world_size is not None and not wrong.intersection(_WORLD_READS):
        found += _world(config, world_size)
    return found


def _refuse(found: list[str]) -> None:
    if found:
        raise ConfigError(
            f"{len(found)} setting(s) do not fit:\n" + "\n".join(f"  - {line}" for line in found)
        )


def _beyond_ranges(config: RunConfig, sections: tuple[str, ...] = ()) -> tuple[list[str], set[str]]:
    """Return a message for each setting outside its range, and the sections that hold such settings.

    Looks only at the given sections, or at every section if none is given.
    """
    beyond = [(name.split(".")[0], message) for name, message in out_of_range(config)]
    if sections:
        beyond = [(section, message) for section, message in beyond if section in sections]
    return [message for _, message in beyond], {section for section, _ in beyond}


def _model(config: RunConfig) -> Iterator[str]:
    model = config.model
    if model.head_size is None and model.hidden_size % model.num_heads:
        yield (
            f"model.hidden_size={model.hidden_size} is not divisible by model.num_heads="
            f"{model.num_heads}; change one of them or set model.head_size"
        )
    if derive.head_size(model) % 2:
        yield (
            f"the head size {derive.head_size(model)} is odd, but rotary positions need an even one; "
            "change model.head_size or model.num_heads"
        )
    kv_heads = derive.num_kv_heads(model)
    if model.num_heads % kv_heads:
        yield f"model.num_heads={model.num_heads} is not a multiple of model.num_kv_heads={kv_heads}"
    if model.head_bias and model.tie_embeddings:
        yield (
            "model.head_bias=true and model.tie_embeddings=true exclude each other; set one to false"
        )


def _eso(config: RunConfig) -> Iterator[str]:
    objective, rows = config.objective, config.train.global_batch_rows
    if objective.name != "eso":
        return
    fraction = derive.diffusion_fraction(objective)
    if objective.loss_weight == "constant" and objective.alpha_0 < 1:
        yield (
            f"objective.loss_weight=constant with objective.alpha_0={objective.alpha_0} would break the "
            "balance of the two losses; use loss_weight=elbo or alpha_0=1"
        )
    if objective.alpha_0 in (0.0, 1.0) and fraction != objective.alpha_0:
        yield (
            f"objective.diffusion_fraction={fraction} with objective.alpha_0={objective.alpha_0}: "
            f"with this alpha_0 all rows take the same pass, so it must be {objective.alpha_0:g} (or null)"
        )
    elif 0 < objective.alpha_0 < 1 and fraction in (0.0, 1.0):
        yield (
            f"objective.diffusion_fraction={fraction} with objective.alpha_0={objective.alpha_0}: both "
            "passes need rows, so it must be strictly between 0 and 1"
        )
    exact = rows * fraction
    if abs(exact - round(exact)) > 1e-9:
        yield (
            f"objective.diffusion_fraction={fraction} of train.global_batch_rows={rows} is {exact:g} rows; "
            "choose numbers that give a whole number of rows"
        )
    elif 0 < fraction < 1 and round(exact) % 2:
        yield (
            f"{round(exact)} diffusion rows in a global batch of {rows} rows: their number must be even, "
            "as a slot holds two diffusion rows, or one sequential row with its mask copies; change "
            "train.global_batch_rows"
        )
    if fraction < 1 and config.train.micro_batch_rows % 2:
        yield (
            f"train.micro_batch_rows={config.train.micro_batch_rows} must be even: a sequential row "
            "runs as two stack rows in one micro-batch"
        )


def _rotary_table(config: RunConfig) -> Iterator[str]:
    train, model = config.train, config.model
    if train.sequence_length > model.max_length:
        yield (
            f"train.sequence_length={train.sequence_length} is longer than the rotary table "
            f"(model.max_length={model.max_length}); raise model.max_length"
        )


def _length(config: RunConfig) -> Iterator[str]:
    train = config.train
    if train.steps is None and train.tokens is None:
        yield "set train.steps or train.tokens; both are null"
    elif train.steps is not None and train.tokens is not None:
        yield (
            f"train.steps={train.steps} and train.tokens={train.tokens} are both set; set one to null"
        )
    batch_tokens = train.global_batch_rows * train.sequence_length
    if train.steps is None and train.tokens is not None and train.tokens % batch_tokens:
        below = train.tokens // batch_tokens * batch_tokens
        yield (
            f"train.tokens={train.tokens} is not a multiple of one global batch ({batch_tokens} tokens); "
            + (f"the nearest below is {below}" if below else "that is the smallest value")
        )


def _profile(config: RunConfig) -> Iterator[str]:
    """Refuse steps and ranks that the run does not have: they would silently never be profiled."""
    steps = derive.total_steps(config)
    beyond = [step for step in config.train.profile_steps if not 1 <= step <= steps]
    if beyond and steps:
        yield (
            f"train.profile_steps={config.train.profile_steps}: the run has no step {beyond[0]}, its steps "
            f"are 1 to {steps}"
        )
    if any(rank < 0 for rank in config.train.profile_ranks):
        yield f"train.profile_ranks={config.train.profile_ranks} must be at least 0"


def _layout(config: RunConfig) -> Iterator[str]:
    model, parallel, train = config.model, config.parallel, config.train
    divisions = {
        "model.num_heads": model.num_heads,
        "model.num_kv_heads": derive.num_kv_heads(model),
        "the MLP width (model.ffn_size)": derive.ffn_size(model),
        "the padded vocabulary (model.vocab_padding_multiple)": derive.padded_vocab_size(model),
    }
    for what, number in divisions.items():
        if number % parallel.tensor:
            yield f"{what} = {number} is not divisible by parallel.tensor={parallel.tensor}; change one"
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
            f"model.num_layers={model.num_layers} is not divisible by parallel.pipeline x "
            f"parallel.virtual_pipeline = {parallel.pipeline} x {parallel.virtual_pipeline}; change one of "
            "them"
        )
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        yield (
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} with parallel.pipeline=1: interleaved "
            "chunks need more than one pipeline rank; raise parallel.pipeline or set virtual_pipeline to 1"
        )
    yield from _heads_of_context_ranks(config)


def _cuda_graphs(config: RunConfig) -> Iterator[str]:
    """Refuse what a CUDA graph cannot do: it repeats the same kernels on the same addresses."""
    if not config.parallel.cuda_graphs:
        return
    unfit = {
        f"model.dropout={config.model.dropout} draws new numbers in each pass; set it to 0": (
            config.model.dropout > 0
        ),
        f"parallel.recompute={config.parallel.recompute} repeats passes that a graph has fixed; set it to "
        "none": config.parallel.recompute != "none",
        f"precision.fp8={config.precision.fp8} updates its scales in code that a graph leaves out; set it "
        "to off": config.precision.fp8 != "off",
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
    if train.profile_steps and any(rank >= world_size for rank in train.profile_ranks):
        yield (
            f"train.profile_ranks={train.profile_ranks}: the run's ranks are 0 to {world_size - 1}"
        )
    replica = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % replica:
        yield (
            f"{world_size} rank(s) cannot hold copies of the model that take tensor x pipeline x context = "
            f"{parallel.tensor} x {parallel.pipeline} x {parallel.context} = {replica} ranks each; start a "
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
            f"rank(s): their number must be a multiple of {per_round}"
        )
    elif parallel.virtual_pipeline > 1 and numbers.num_micro_batches % parallel.pipeline:
        yield (
            f"{numbers.num_micro_batches} micro-batches are not a multiple of parallel.pipeline="
            f"{parallel.pipeline}, as the interleaved schedule needs; change train.micro_batch_rows or "
            "train.global_batch_rows"
        )


def _optimizer(config: RunConfig) -> Iterator[str]:
    optimizer = config.optimizer
    if optimizer.min_learning_rate > optimizer.learning_rate:
        yield (
            f"optimizer.min_learning_rate={optimizer.min_learning_rate} is above "
            f"optimizer.learning_rate={optimizer.learning_rate}; lower it"
        )
    steps = derive.total_steps(config)
    decay, how = optimizer.decay_steps or 0, ""
    if optimizer.schedule == "constant":
        decay = 0
        for name, none in (("decay_steps", None), ("min_learning_rate", 0)):
            value = getattr(optimizer, name)
            if value != none:
                yield (
                    f"optimizer.{name}={value} has no effect with optimizer.schedule=constant, which has "
                    f"no decay; set it to {'null' if none is None else none}, or choose cosine or wsd"
                )
    elif optimizer.decay_steps is not None:
        how = f" and optimizer.decay_steps={decay}"
    elif optimizer.schedule == "wsd":
        decay = derive.wsd_decay_steps(optimizer, steps)
        how = f" and optimizer.decay_steps=null (wsd: a tenth of the steps, {decay})"
    if optimizer.warmup_steps + decay > steps > 0:
        yield (
            f"optimizer.warmup_steps={optimizer.warmup_steps}{how} take more than the run's {steps} steps; "
            "lower them or train longer"
        )


def _precision(config: RunConfig) -> Iterator[str]:
    precision = config.precision
    if precision.deterministic and precision.attention == "flex":
        yield (
            "precision.deterministic=true with precision.attention=flex: PyTorch does not promise that "
            "FlexAttention's gradients are repeatable; set precision.attention=split (or auto)"
        )
    yield from broken(SETTINGS_RULES, config)


def _baselines(config: RunConfig) -> Iterator[str]:
    objective, train = config.objective, config.train
    if objective.name != "eso" and objective.diffusion_fraction is not None:
        yield (
            f"objective.diffusion_fraction={objective.diffusion_fraction} has no effect with "
            f"objective.name={objective.name}, whose rows all take one pass; set it to null"
        )
    if objective.name == "ar" and objective.loss_weight != "elbo":
        yield (
            f"objective.loss_weight={objective.loss_weight} has no effect with objective.name=ar, which "
            "has no diffusion loss; leave it out"
        )
    if objective.name != "bd3lm":
        return
    if train.sequence_length % objective.block_size:
        yield (
            f"objective.block_size={objective.block_size} does not divide train.sequence_length="
            f"{train.sequence_length}; change one of them"
        )
    if train.micro_batch_rows % 2:
        yield (
            f"train.micro_batch_rows={train.micro_batch_rows} must be even with objective.name=bd3lm: a "
            "row runs as two stack rows"
        )


def _resilience(config: RunConfig) -> Iterator[str]:
    for name in ("on_nonfinite", "on_spike"):
        if getattr(config.resilience, name) == "rollback" and not config.train.save_every_steps:
            yield (
                f"resilience.{name}=rollback goes back to a checkpoint, but train.save_every_steps=null "
                "writes none before the end; set train.save_every_steps"
            )


_RULES: dict[Callable[[RunConfig], Iterator[str]], tuple[str, ...]] = {
    _model: ("model",),
    _eso: ("objective", "train"),
    _rotary_table: ("model", "train"),
    _length: ("train",),
    _profile: ("train",),
    _layout: ("model", "parallel", "train"),
    _cuda_graphs: (),
    _optimizer: ("optimizer", "train"),
    _precision: ("eval", "model", "objective", "optimizer", "parallel", "precision", "train"),
    _baselines: ("objective", "train"),
    _resilience: ("resilience", "train"),
}
"""Each rule, and the sections whose settings must be within their ranges for it to run."""
_WORLD_READS = ("model", "objective", "parallel", "train")
