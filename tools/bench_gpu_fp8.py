"""FP8 on a GPU: its speed against BF16, and how far its losses are from BF16's."""

from megatron_eso.train.step import train_step
from tools.bench_gpu_parts import (
    FP8,
    FP8_ATTENTION,
    HAS_TE,
    batch_settings,
    best_seconds,
    counting_rows,
    free_memory,
    make_session,
    random_rows,
    ratio,
)  # fmt: skip
from tools.bench_gpu_report import Report
from tools.bench_gpu_sizes import STEADY, Sizes

_FP8_PARAMETERS = ["precision.fp8_params=true", "eval.use_ema=false"]


_WAYS = {
    "BF16, plain layers": ["precision.backend=torch"],
    "BF16": ["precision.backend=te"],
    "BF16, te attention": ["precision.backend=te", "precision.attention=te"],
    "FP8 products": FP8,
    "FP8 products and attention": FP8_ATTENTION,
    "FP8 products, attention, parameters": [*FP8_ATTENTION, *_FP8_PARAMETERS],
}
_NEEDS_TE = "not measured: needs a GPU and Transformer Engine"


def fp8(sizes: Sizes, report: Report) -> None:
    """FP8 products and attention against BF16, if Transformer Engine is installed. Aim: 1.25 x BF16."""
    if not HAS_TE:
        report.row("FP8", result=_NEEDS_TE)
        return
    label, shape = list(sizes.shapes.items())[-1]
    for length in sizes.lengths:
        found: dict[str, float] = {}
        for name, way in _WAYS.items():
            with report.trying(f"{label}, L = {length}: {name}"):
                batch = batch_settings(sizes.step_tokens, length)
                settings = [*shape, *batch, "objective.alpha_0=1", "precision.dtype=bf16", *way]
                session = make_session(settings)
                read = random_rows(length, session.config.model.vocab_size - 1)
                seconds = best_seconds(lambda s=session, r=read: train_step(s, r), sizes.repeats)
                found[name] = seconds
                speed = session.config.train.global_batch_rows * length / seconds
                report.row(
                    f"{label}, L = {length}: {name}", tokens_per_second=speed,
                    of_plain=ratio(found.get("BF16, plain layers"), seconds),
                    of_bf16=ratio(found.get("BF16"), seconds),
                    memory_gib=session.device.memory_gib(), settings=settings,
                )  # fmt: skip
            session = None
            free_memory()


def fp8_losses(sizes: Sizes, report: Report) -> None:
    """Losses of the same steps, and how far those of the last quarter are from those in bf16."""
    if not HAS_TE:
        report.row("FP8", result=_NEEDS_TE)
        return
    ways = _WAYS | {"FP8 products, delayed scales": ["precision.fp8=delayed"]}
    base: list[float] | None = None
    for name, settings in ways.items():
        with report.trying(f"{sizes.fp8_loss_steps} steps: {name}"):
            session = make_session(
                [*sizes.fp8_loss_shape, "model.max_length=128", "train.sequence_length=128",
                 "train.global_batch_rows=16", "train.micro_batch_rows=24", "objective.alpha_0=0.5",
                 *STEADY, "precision.dtype=bf16", *settings]
            )  # fmt: skip
            read = counting_rows(128, session.config.model.vocab_size - 1)
            found = [train_step(session, read).loss for _ in range(sizes.fp8_loss_steps)]
            base = found if name == "BF16, plain layers" else base
            last = slice(-len(found) // 4, None)
            pairs = zip(found[last], base[last], strict=True) if base else ()
            gaps = [abs(a - b) / b for a, b in pairs]
            report.row(
                f"{sizes.fp8_loss_steps} steps: {name}", first=found[0],
                last_quarter=sum(found[last]) / len(found[last]),
                mean_gap=sum(gaps) / len(gaps) if gaps else None, losses=found,
            )  # fmt: skip
