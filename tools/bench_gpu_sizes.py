"""Shapes of the GPU benchmark: full ones, and tiny ones that show that it runs."""

from dataclasses import dataclass, replace

from megatron_eso.errors import ConfigError

# At 0.001 without warmup, rounding alone separates two runs by a tenth of the loss (docs/LOG.md).
STEADY = ["optimizer.learning_rate=0.0003", "optimizer.warmup_steps=10"]


@dataclass(frozen=True)
class Sizes:
    """What is measured; shapes are model settings."""

    shapes: dict[str, list[str]]
    """Shapes of whole steps, by label; the last one is also that of FP8."""
    lengths: tuple[int, ...]
    """Tokens of a row in whole steps and in attention."""
    step_tokens: int
    """Tokens of a training step; a micro-batch has a fourth of them."""
    heads: int
    head_size: int
    checked_length: int
    """Tokens of the rows on which attention is compared with float64."""
    vocab: int
    graph_cases: dict[str, tuple[list[str], int]]
    """Shapes and tokens of a row, with and without CUDA graphs."""
    sampling_shape: list[str]
    sampling_lengths: tuple[int, ...]
    """Tokens of a generated row."""
    loss_shape: list[str]
    loss_steps: int
    fp8_loss_shape: list[str]
    """A shape with a head size of 128, which FP8 attention needs."""
    fp8_loss_steps: int
    repeats: int
    """How often a call is timed; the best time counts."""


def _shape(
    hidden_size: int, num_layers: int, num_heads: int, vocab_size: int, *more: str
) -> list[str]:
    names = "hidden_size", "num_layers", "num_heads", "vocab_size"
    values = hidden_size, num_layers, num_heads, vocab_size
    return [*(f"model.{n}={v}" for n, v in zip(names, values, strict=True)), *more]


_ONE_B = _shape(2048, 16, 16, 32768, "model.ffn_size=5504")
_TINY = _shape(32, 2, 2, 64)

FULL = Sizes(
    shapes={
        "1B": _ONE_B,
        "7B-shaped, 4 layers": _shape(4096, 4, 32, 32768, "model.ffn_size=11008"),
    },
    lengths=(4096, 16384), step_tokens=65536, heads=32, head_size=128, checked_length=1024,
    vocab=32768,
    graph_cases={"124M": (_shape(768, 12, 12, 32768), 1024), "1B": (_ONE_B, 4096)},
    sampling_shape=_shape(768, 12, 12, 50258), sampling_lengths=(2048, 8192),
    loss_shape=_shape(256, 4, 4, 512), loss_steps=50,
    fp8_loss_shape=_shape(512, 4, 4, 512), fp8_loss_steps=200, repeats=3,
)  # fmt: skip
SMOKE = Sizes(
    shapes={"tiny": _TINY},
    lengths=(64,), step_tokens=512, heads=2, head_size=16, checked_length=128,
    vocab=64,
    graph_cases={"tiny": (_TINY, 64)},
    sampling_shape=_TINY, sampling_lengths=(48,),
    loss_shape=_TINY, loss_steps=4,
    fp8_loss_shape=_shape(256, 1, 2, 512), fp8_loss_steps=2, repeats=1,
)  # fmt: skip


def chosen(sizes: Sizes, shapes: list[str] | None, lengths: list[int] | None) -> Sizes:
    """Return the sizes with only the given shapes and lengths; None: all of them.

    Raises:
        ConfigError: if a given shape or length is not among them.
    """
    shapes, lengths = shapes or list(sizes.shapes), lengths or list(sizes.lengths)
    for name, asked, known in (("shape", shapes, sizes.shapes), ("length", lengths, sizes.lengths)):
        strange = [str(x) for x in asked if x not in known]
        if strange:
            there = ", ".join(map(str, known))
            raise ConfigError(f"--{name} {', '.join(strange)}: there are {there}")
    return replace(sizes, shapes={s: sizes.shapes[s] for s in shapes}, lengths=tuple(lengths))
