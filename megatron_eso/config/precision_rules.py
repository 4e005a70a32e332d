"""The parts of precision rules: the machine they look at, a rule, and which settings want what.

The rules themselves are the table in precision_table.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_eso.config.schema import RunConfig

Version = tuple[int, ...]
OLDEST_TE: Version = (2, 9)
BROKEN_CUDNN: tuple[Version, ...] = ((9, 10, 0), (9, 10, 1))
"""Releases whose bf16 attention Transformer Engine refuses to use (tested: docs/LOG.md)."""
FUSED_ATTENTION = {"NVTE_FUSED_ATTN": "1", "NVTE_FLASH_ATTN": "0", "NVTE_UNFUSED_ATTN": "0"}
"""Without these, Transformer Engine may silently fall back to its unfused kernel, at many times the
cost. Megatron-Core sets them for a model and refuses other values for a second one in the same process."""
DPA_RECIPE = "NVTE_DPA_FP8_RECIPE"
# Layers shaped like those of a 7B model, because the rules depend on shapes.
_SHAPE = (
    "model.hidden_size=4096", "model.num_layers=32", "model.num_heads=32", "model.num_kv_heads=8",
    "model.max_length=4096", "train.sequence_length=4096", "train.micro_batch_rows=2", "train.steps=1",
    "precision.dtype=bf16", "precision.backend=te", "precision.attention=te",
)  # fmt: skip
ASKED = {
    "te": _SHAPE,
    "fp8": (*_SHAPE, "precision.fp8=tensorwise"),
    "fp8-attention": (*_SHAPE, "precision.fp8=tensorwise", "precision.fp8_attention=true"),
}
"""What ``doctor --check`` can ask for, expressed as settings."""


@dataclass(frozen=True)
class Machine:
    """What the rules must know about a rank's machine."""

    gpu: str = ""
    """Name of the GPU; empty: there is none."""
    capability: Version = (0, 0)
    """CUDA compute capability."""
    te: Version | None = None
    """Version of Transformer Engine; None: it cannot be imported."""
    te_failure: str = "it is not installed"
    """Why it cannot be imported."""
    cudnn: Version = (0, 0, 0)
    """Version of cuDNN that Transformer Engine uses."""
    dpa_recipe: str = ""
    """Value of NVTE_DPA_FP8_RECIPE that Transformer Engine read when it was imported."""


@dataclass(frozen=True)
class Rule:
    """One condition that must hold where it applies."""

    name: str
    applies: Callable[[RunConfig], bool]
    holds: Callable[[RunConfig, Machine], bool]
    message: Callable[[RunConfig, Machine], str]


def wants_fp8(config: RunConfig) -> bool:
    """Return whether any part computes in FP8."""
    return config.precision.fp8 != "off" or config.precision.fp8_attention


def wants_te_attention(config: RunConfig) -> bool:
    """Return whether diffusion rows and true tokens go through Transformer Engine's attention."""
    return config.precision.attention == "te" or config.precision.fp8_attention


def asks_for_fp8(config: RunConfig) -> str:
    """Return the setting that makes a part compute in FP8."""
    fp8 = config.precision.fp8
    return f"precision.fp8={fp8}" if fp8 != "off" else "precision.fp8_attention=true"


def asks_for_te_attention(config: RunConfig) -> str:
    """Return the setting that sends rows through Transformer Engine's attention."""
    return f"precision.{'fp8_attention=true' if config.precision.fp8_attention else 'attention=te'}"


def wants_te(config: RunConfig) -> bool:
    """Return whether the settings need Transformer Engine."""
    return config.precision.backend == "te" or wants_fp8(config) or wants_te_attention(config)


def broken(rules: tuple[Rule, ...], config: RunConfig, machine: Machine | None = None) -> list[str]:
    """Return the message of every rule that applies and does not hold."""
    machine = machine or Machine()
    return [
        rule.message(config, machine)
        for rule in rules
        if rule.applies(config) and not rule.holds(config, machine)
    ]


def process_environment(config: RunConfig) -> dict[str, str]:
    """Return the variables to set before Transformer Engine is imported, because it reads them once."""
    found = {}
    if wants_te_attention(config):
        found |= FUSED_ATTENTION
    if config.precision.fp8_attention:
        found[DPA_RECIPE] = "DelayedScaling"
    return found
