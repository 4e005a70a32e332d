"""Shapes of the GPU benchmark, and the report of its results."""

import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_eso.errors import ConfigError
from tools.bench_gpu_parts import free_memory

# At 0.001 without warm-up rounding alone parts two runs by a tenth of the loss (docs/LOG.md).
STEADY = ["optimizer.learning_rate=0.0003", "optimizer.warmup_steps=10"]


@dataclass(frozen=True)
class Sizes:
    """Shapes of a benchmark: full ones, or tiny ones that show it runs."""

    shapes: dict[str, list[str]]
    """Model settings by label."""
    lengths: tuple[int, ...]
    """Tokens of a row in training and in attention."""
    step_tokens: int
    """Tokens of a training step; a fourth of them at once."""
    heads: int
    head_size: int
    vocab: int
    sampling_lengths: tuple[int, ...]
    loss_steps: int
    fp8_loss_steps: int
    fp8_loss_shape: list[str]
    """Model settings; head size 128, which FP8 attention needs."""
    repeats: int


FULL = Sizes(
    shapes={
        "1B": ["model.hidden_size=2048", "model.num_layers=16", "model.num_heads=16",
               "model.ffn_size=5504", "model.vocab_size=32768"],
        "7B-shaped, 4 layers": ["model.hidden_size=4096", "model.num_layers=4", "model.num_heads=32",
                                "model.ffn_size=11008", "model.vocab_size=32768"],
    },
    lengths=(4096, 16384), step_tokens=65536, heads=32, head_size=128, vocab=32768,
    sampling_lengths=(2048, 8192), loss_steps=50, repeats=3, fp8_loss_steps=200,
    fp8_loss_shape=["model.hidden_size=512", "model.num_layers=4", "model.num_heads=4"],
)  # fmt: skip
SMOKE = Sizes(
    shapes={"tiny": ["model.hidden_size=32", "model.num_layers=2", "model.num_heads=2",
                     "model.vocab_size=64"]},
    lengths=(64,), step_tokens=512, heads=2, head_size=16, vocab=64, sampling_lengths=(48,),
    loss_steps=4, repeats=1, fp8_loss_steps=2,
    fp8_loss_shape=["model.hidden_size=256", "model.num_layers=1", "model.num_heads=2"],
)  # fmt: skip


class Report:
    """Prints rows as they come and keeps them in a file."""

    def __init__(self, out: Path | None) -> None:
        self._out, self._rows = out, []
        self.failures = 0

    def section(self, title: str) -> None:
        """Begin a table."""
        self._title = title
        print(f"\n## {title}\n", flush=True)

    def row(self, what: str, **values: Any) -> None:
        """Add a result."""
        self._rows.append({"section": self._title, "what": what, **values})
        shown = "  ".join(f"{name} {_shown(value)}" for name, value in values.items())
        print(f"{what:<44} {shown}", flush=True)
        if self._out is not None:
            self._out.write_text(json.dumps(self._rows, indent=1) + "\n")

    @contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """Report what stops one result, and go on with the others."""
        try:
            yield
        except ConfigError as error:
            self.row(what, result=f"not measured: {error}")
        except torch.OutOfMemoryError:
            self.row(what, result="out of memory")
        except Exception as error:  # a kernel's compiler may fail in any way
            self.failures += 1
            self.row(what, result=f"failed: {type(error).__name__}: {error}"[:300])
            traceback.print_exc()
        free_memory()


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return "-" if value is None else str(value)
