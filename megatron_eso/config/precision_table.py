"""Which number formats and kernels may be combined: a table of rules over (settings, machine).

A rule says when it applies, when it holds, and what to tell the user if it is broken. Rules that read
only settings are part of ``check``; rules about the machine run on every rank before anything is
allocated, and in ``megatron-eso doctor``. The facts are those of Transformer Engine (2.9 to 2.20),
Megatron-Core (0.16, 0.19) and cuDNN; docs/gpu.md gives the source of each.
"""

from dataclasses import replace

from megatron_eso.config import derive
from megatron_eso.config.precision_rules import (
    BROKEN_CUDNN,
    DPA_RECIPE,
    OLDEST_TE,
    Machine,
    Rule,
    Version,
    asks_for_fp8,
    asks_for_te_attention,
    broken,
    wants_fp8,
    wants_te,
    wants_te_attention,
)
from megatron_eso.config.schema import RunConfig
from megatron_eso.errors import ConfigError


def require_machine(config: RunConfig, machine: Machine) -> None:
    """Raise a :class:`ConfigError` that lists every broken rule about the machine, if any."""
    found = broken(MACHINE_RULES, config, machine)
    if found:
        raise ConfigError(
            "the precision settings do not fit this machine:\n"
            + "\n".join(f"  - {line}" for line in found)
        )


def _odd_features(config: RunConfig) -> dict[str, int]:
    """Return the matrix widths of a tensor rank that FP8 GEMMs cannot take (not multiples of 16)."""
    model, tensor = config.model, config.parallel.tensor
    size, heads = derive.head_size(model), model.num_heads + 2 * derive.num_kv_heads(model)
    widths = {
        "model.hidden_size": model.hidden_size,
        "query, key and value features per tensor rank": heads * size // tensor,
        "attention features per tensor rank": model.num_heads * size // tensor,
        "MLP width per tensor rank": derive.ffn_size(model) // tensor,
    }
    return {name: width for name, width in widths.items() if width % 16}


def _token_multiple(config: RunConfig) -> int:
    """Return the number that must divide the row length, so that every GEMM has 8 n tokens."""
    parallel = config.parallel
    return 8 * (parallel.tensor if parallel.sequence else 1) * parallel.context


def _micro_batch_tokens(config: RunConfig) -> int:
    return config.train.sequence_length // config.parallel.context * config.train.micro_batch_rows


def _bf16_layers(config: RunConfig) -> int:
    return max(config.precision.bf16_first_layers, config.precision.bf16_last_layers)


def _dots(version: Version) -> str:
    return ".".join(map(str, version))


def _cudnn_runs_fp8(config: RunConfig, machine: Machine) -> bool:
    whole_tiles = config.train.sequence_length % 128 == 0
    has_older_kernel = whole_tiles and machine.capability < (10, 0)
    return machine.cudnn >= ((9, 2, 1) if has_older_kernel else (9, 7, 0))


def _evaluated_stack_rows(config: RunConfig) -> int:
    """Return the largest number of stack rows that one row takes at the same time in an evaluation."""
    objective, settings = config.objective, config.eval
    if settings.alpha_0 is not None:
        objective = replace(objective, alpha_0=settings.alpha_0)
    has_bound = objective.name == "eso" and settings.likelihood_orders > 0
    return max(derive.nelbo_stack_rows(objective), 2 if has_bound else 1)


def _wants_buffers(config: RunConfig) -> bool:
    return config.parallel.tensor_overlap


SETTINGS_RULES = (
    Rule(
        "user buffers: layers",
        _wants_buffers,
        lambda c, m: c.precision.backend != "torch",
        lambda c, m: (
            "parallel.tensor_overlap=true with precision.backend=torch: its buffers are Transformer "
            "Engine's; set precision.backend=te (or auto), or parallel.tensor_overlap=false"
        ),
    ),
    Rule(
        "user buffers: ranks",
        _wants_buffers,
        lambda c, m: c.parallel.tensor > 1 and c.parallel.sequence,
        lambda c, m: (
            f"parallel.tensor_overlap=true with parallel.tensor={c.parallel.tensor}, sequence="
            f"{str(c.parallel.sequence).lower()}: it overlaps the exchange of sequence parallelism between "
            "tensor ranks; set parallel.tensor > 1 and parallel.sequence=true"
        ),
    ),
    Rule(
        "user buffers: bf16",
        _wants_buffers,
        lambda c, m: c.precision.dtype != "fp32",
        lambda c, m: (
            "parallel.tensor_overlap=true with precision.dtype=fp32: the buffers hold bf16; set "
            "precision.dtype=bf16 (or auto)"
        ),
    ),
    Rule(
        "user buffers: evaluation",
        _wants_buffers,
        lambda c, m: _evaluated_stack_rows(c) <= c.train.micro_batch_rows,
        lambda c, m: (
            f"parallel.tensor_overlap=true with train.micro_batch_rows={c.train.micro_batch_rows}: the "
            f"buffers have the shape of a step's micro-batch, and one evaluated row takes "
            f"{_evaluated_stack_rows(c)} stack rows; raise train.micro_batch_rows"
        ),
    ),
    Rule(
        "torch layers",
        lambda c: c.precision.backend == "torch",
        lambda c, m: not wants_fp8(c) and not wants_te_attention(c),
        lambda c, m: (
            f"precision.backend=torch with precision.fp8={c.precision.fp8}, fp8_attention="
            f"{str(c.precision.fp8_attention).lower()}, attention={c.precision.attention}: FP8 and "
            "attention=te need Transformer Engine; set precision.backend=te (or auto)"
        ),
    ),
    Rule(
        "FP8 over bf16",
        wants_fp8,
        lambda c, m: c.precision.dtype != "fp32",
        lambda c, m: (
            f"{asks_for_fp8(c)} with precision.dtype=fp32: FP8 takes bf16 inputs; set "
            "precision.dtype=bf16 (or auto)"
        ),
    ),
    Rule(
        "FP8 region",
        lambda c: c.precision.fp8_attention,
        lambda c, m: c.precision.fp8 != "off",
        lambda c, m: (
            "precision.fp8_attention=true with precision.fp8=off: Transformer Engine computes attention "
            "in FP8 only where the linear layers do; set precision.fp8=tensorwise (or delayed)"
        ),
    ),
    Rule(
        "FP8 attention: head size",
        lambda c: c.precision.fp8_attention,
        lambda c, m: derive.head_size(c.model) == 128,
        lambda c, m: (
            "precision.fp8_attention=true needs a head size of exactly 128, not "
            f"{derive.head_size(c.model)}; change model.head_size or set precision.fp8_attention=false"
        ),
    ),
    Rule(
        "FP8 attention: kernel",
        lambda c: c.precision.fp8_attention,
        lambda c, m: c.precision.attention in ("auto", "te"),
        lambda c, m: (
            f"precision.attention={c.precision.attention} with precision.fp8_attention=true: only "
            "Transformer Engine's kernel computes in FP8; set precision.attention=te (or auto)"
        ),
    ),
    Rule(
        "FP8 attention: recomputation",
        lambda c: c.precision.fp8_attention,
        lambda c, m: c.parallel.recompute != "attention",
        lambda c, m: (
            "parallel.recompute=attention with precision.fp8_attention=true: Megatron runs the kernel "
            "again without Transformer Engine's record of FP8 scales; set parallel.recompute=none or full"
        ),
    ),
    Rule(
        "TE attention: causal rows",
        wants_te_attention,
        lambda c, m: c.objective.name in ("eso", "ar"),
        lambda c, m: (
            f"precision.attention=te (or fp8_attention) with objective.name={c.objective.name}: only "
            "causal rows go through Transformer Engine; set precision.attention=auto and "
            "precision.fp8_attention=false"
        ),
    ),
    Rule(
        "TE attention: bf16",
        wants_te_attention,
        lambda c, m: c.precision.dtype != "fp32",
        lambda c, m: (
            f"{asks_for_te_attention(c)} with precision.dtype=fp32: its fused kernels take bf16; set "
            "precision.dtype=bf16 (or auto), or precision.attention=split and precision.fp8_attention=false"
        ),
    ),
    Rule(
        "TE attention: head size",
        lambda c: wants_te_attention(c) and not c.precision.fp8_attention,
        lambda c, m: derive.head_size(c.model) % 8 == 0,
        lambda c, m: (
            f"precision.attention=te needs a head size that is a multiple of 8, not "
            f"{derive.head_size(c.model)} (model.head_size); or set precision.attention=split"
        ),
    ),
    Rule(
        "FP8 GEMM: tokens",
        wants_fp8,
        lambda c, m: c.train.sequence_length % _token_multiple(c) == 0,
        lambda c, m: (
            f"train.sequence_length={c.train.sequence_length} with {asks_for_fp8(c)}: each rank's part of "
            f"a row must be a multiple of 8 tokens; use a multiple of {_token_multiple(c)}"
        ),
    ),
    Rule(
        "FP8 GEMM: tokens of a micro-batch",
        wants_fp8,
        lambda c, m: _micro_batch_tokens(c) % 16 == 0,
        lambda c, m: (
            f"train.sequence_length={c.train.sequence_length} / parallel.context={c.parallel.context} x "
            f"train.micro_batch_rows={c.train.micro_batch_rows} = {_micro_batch_tokens(c)} tokens with "
            f"{asks_for_fp8(c)}: the product that gives weight gradients needs a multiple of 16 "
            "(Transformer Engine: leading dimension % 16 == 0); change one of the three"
        ),
    ),
    Rule(
        "FP8 GEMM: features",
        wants_fp8,
        lambda c, m: not _odd_features(c),
        lambda c, m: (
            f"{asks_for_fp8(c)} needs matrices whose sides are multiples of 16 on each "
            f"tensor rank (parallel.tensor={c.parallel.tensor}); these are not: "
            + ", ".join(f"{name} = {width}" for name, width in _odd_features(c).items())
        ),
    ),
    Rule(
        "bf16 layers: recipe",
        lambda c: _bf16_layers(c) > 0,
        lambda c, m: c.precision.fp8 == "tensorwise",
        lambda c, m: (
            f"precision.bf16_first_layers={c.precision.bf16_first_layers}, bf16_last_layers="
            f"{c.precision.bf16_last_layers} with precision.fp8={c.precision.fp8}: only tensorwise "
            "scaling may leave and enter FP8 between layers (delayed scales are reduced once per region); "
            "set precision.fp8=tensorwise or both to 0"
        ),
    ),
    Rule(
        "bf16 layers: number",
        lambda c: c.precision.fp8 != "off",
        lambda c, m: (
            _bf16_layers(c) <= c.model.num_layers // c.parallel.pipeline
            and c.precision.bf16_first_layers + c.precision.bf16_last_layers < c.model.num_layers
        ),
        lambda c, m: (
            f"precision.bf16_first_layers={c.precision.bf16_first_layers} and bf16_last_layers="
            f"{c.precision.bf16_last_layers} must lie within one pipeline stage of "
            f"{c.model.num_layers} / {c.parallel.pipeline} layers and leave a layer in FP8"
        ),
    ),
    Rule(
        "FP8 parameters: recipe",
        lambda c: c.precision.fp8_params,
        lambda c, m: c.precision.fp8 != "off",
        lambda c, m: "precision.fp8_params=true needs precision.fp8=tensorwise or delayed, not off",
    ),
    Rule(
        "FP8 parameters: averages",
        lambda c: c.precision.fp8_params and c.optimizer.ema_decay > 0,
        lambda c, m: not c.eval.use_ema,
        lambda c, m: (
            "precision.fp8_params=true with optimizer.ema_decay > 0 and eval.use_ema=true: swapping in the "
            "average for an evaluation, and the weights back in, would round them again; set "
            "eval.use_ema=false or precision.fp8_params=false"
        ),
    ),
    Rule(
        "FP8 parameters: initial weights",
        lambda c: c.precision.fp8_params,
        lambda c, m: c.checkpoint.init_from is None,
        lambda c, m: (
            f"precision.fp8_params=true with checkpoint.init_from={c.checkpoint.init_from}: the master "
            "weights would be read back from FP8; set precision.fp8_params=false"
        ),
    ),
)

MACHINE_RULES = (
    Rule(
        "GPU",
        wants_te,
        lambda c, m: bool(m.gpu),
        lambda c, m: (
            "Transformer Engine was asked for (precision.backend, fp8, fp8_attention or attention), but "
            "there is no GPU; set precision.backend=auto, fp8=off, fp8_attention=false, attention=auto"
        ),
    ),
    Rule(
        "Transformer Engine",
        wants_te,
        lambda c, m: m.te is not None,
        lambda c, m: (
            f"Transformer Engine was asked for, but cannot be imported: {m.te_failure}; install it "
            "(docs/gpu.md), or set precision.backend=auto, fp8=off, fp8_attention=false, attention=auto"
        ),
    ),
    Rule(
        "Transformer Engine: version",
        wants_te,
        lambda c, m: m.te is None or m.te >= OLDEST_TE,
        lambda c, m: (
            f"Transformer Engine {_dots(m.te or ())} is too old: {_dots(OLDEST_TE)} or newer is needed "
            "(docs/gpu.md)"
        ),
    ),
    Rule(
        "FP8: GPU",
        wants_fp8,
        lambda c, m: not m.gpu or m.capability >= (9, 0),
        lambda c, m: (
            f"{asks_for_fp8(c)}: {m.gpu} has compute capability {_dots(m.capability)}; FP8 needs 9.0 "
            "(Hopper) or newer; set precision.fp8=off and precision.fp8_attention=false"
        ),
    ),
    Rule(
        "TE attention: GPU",
        wants_te_attention,
        lambda c, m: not m.gpu or m.capability >= (8, 0),
        lambda c, m: (
            f"{asks_for_te_attention(c)}: {m.gpu} has compute capability {_dots(m.capability)}; fused "
            "attention needs 8.0 or newer; set precision.attention=split and precision.fp8_attention=false"
        ),
    ),
    Rule(
        "TE attention: cuDNN",
        wants_te_attention,
        lambda c, m: m.te is None or m.cudnn not in BROKEN_CUDNN,
        lambda c, m: (
            f"{asks_for_te_attention(c)}: Transformer Engine refuses the bf16 attention of cuDNN "
            f"{_dots(m.cudnn)}; install another cuDNN, or set precision.attention=split and "
            "precision.fp8_attention=false"
        ),
    ),
    Rule(
        "FP8 attention: GPU",
        lambda c: c.precision.fp8_attention,
        lambda c, m: m.capability < (9, 0) or m.capability[0] in (9, 10),
        lambda c, m: (
            f"precision.fp8_attention=true: {m.gpu} has compute capability {_dots(m.capability)}; cuDNN "
            "computes FP8 attention only on 9.x and 10.x; set precision.fp8_attention=false"
        ),
    ),
    Rule(
        "FP8 attention: cuDNN",
        lambda c: c.precision.fp8_attention,
        lambda c, m: m.te is None or _cudnn_runs_fp8(c, m),
        lambda c, m: (
            f"precision.fp8_attention=true with train.sequence_length={c.train.sequence_length}: cuDNN "
            f"{_dots(m.cudnn)} does not compute it on compute capability {_dots(m.capability)}; it needs "
            "9.7 (on Hopper 9.2.1 if the row is a multiple of 128)"
        ),
    ),
    Rule(
        "FP8 attention: determinism",
        lambda c: c.precision.fp8_attention and c.precision.deterministic,
        lambda c, m: m.te is None or (m.te >= (2, 13) and m.cudnn >= (9, 19, 0)),
        lambda c, m: (
            "precision.deterministic=true with precision.fp8_attention=true: Transformer Engine "
            f"{_dots(m.te or ())} with cuDNN {_dots(m.cudnn)} has no deterministic FP8 backward pass; it "
            "needs 2.13 with 9.19; otherwise set one of the two to false"
        ),
    ),
    Rule(
        "FP8 attention: recipe",
        lambda c: c.precision.fp8_attention,
        lambda c, m: (
            m.te is None
            or m.dpa_recipe == "DelayedScaling"
            or (c.precision.fp8 == "delayed" and not m.dpa_recipe)
        ),
        lambda c, m: (
            f"precision.fp8_attention=true with precision.fp8={c.precision.fp8}: attention has only "
            f"delayed scaling, but Transformer Engine was imported with {DPA_RECIPE}={m.dpa_recipe!r}; "
            f"start with `{DPA_RECIPE}=DelayedScaling` (the commands of megatron-eso do)"
        ),
    ),
)
