"""The one place that asks Transformer Engine about itself: version, cuDNN, and its choice of attention.

It is imported only when it is asked about. Its private parts (its table of attention backends, the names of
its log) are used only here; docs/gpu.md lists what was used from where.
"""

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from megatron_eso.config import derive
from megatron_eso.config.precision_rules import DPA_RECIPE, Machine, Version, wants_te_attention
from megatron_eso.config.schema import RunConfig
from megatron_eso.errors import ConfigError
from megatron_eso.parallel.megatron_patches import load_cudnn_of_torch

_DPA = "transformer_engine.pytorch.attention.dot_product_attention"
BACKENDS = ("FlashAttention", "FusedAttention", "UnfusedDotProductAttention")


def describe_machine() -> Machine:
    """Return what the precision rules must know about this rank's GPU and packages."""
    gpu, capability = "", (0, 0)
    if torch.cuda.is_available():
        gpu, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    load_cudnn_of_torch(os.environ, Path(torch.__file__).parent.parent)  # as a run does
    try:
        te = importlib.import_module("transformer_engine")
        importlib.import_module("transformer_engine.pytorch")
        dpa: Any = importlib.import_module(f"{_DPA}.dot_product_attention")
    except ImportError as error:
        return Machine(gpu=gpu, capability=capability, te_failure=_first_line(error))
    except (OSError, RuntimeError) as error:  # its libraries are there but do not load
        failure = f"{type(error).__name__}: {_first_line(error)}"
        return Machine(gpu=gpu, capability=capability, te_failure=failure)
    return Machine(
        gpu=gpu,
        capability=capability,
        te=version_of(te.__version__),
        cudnn=_cudnn_version() if gpu else (0, 0, 0),
        # Transformer Engine reads the variable once, at import; a later change has no effect.
        dpa_recipe=getattr(dpa, "_dpa_fp8_recipe", os.environ.get(DPA_RECIPE, "")),
    )


def version_of(text: str) -> Version:
    """Return the leading numbers of a version: 2.11.0+abc -> (2, 11, 0)."""
    numbers = []
    for part in text.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


@dataclass(frozen=True)
class AttentionChoice:
    """Which attention backend Transformer Engine would run, and why not the others."""

    chosen: str
    """One of BACKENDS, or empty."""
    reasons: tuple[str, ...]
    """What it said about the backends it rejected."""


def attention_choice(config: RunConfig) -> AttentionChoice:
    """Return the backend that Transformer Engine takes for a run's causal rows; needs a GPU.

    Raises:
        ConfigError: if this version's answer has an unknown form.
    """
    utils: Any = importlib.import_module(f"{_DPA}.utils")
    with _said_by(utils) as reasons:
        answer = utils.get_attention_backend(_attention_parameters(utils, config))
    if len(answer) != 6:
        raise ConfigError(
            f"Transformer Engine's choice of attention has {len(answer)} parts, not 6: this version is "
            "unknown; use one that docs/gpu.md names, or set precision.attention=split"
        )
    flash, _, fused, _, unfused, _ = answer
    chosen = [name for name, is_on in zip(BACKENDS, (flash, fused, unfused), strict=True) if is_on]
    return AttentionChoice(chosen[0] if chosen else "", tuple(reasons))


def require_fused_attention(config: RunConfig) -> AttentionChoice | None:
    """Refuse a run whose Transformer Engine attention would not be cuDNN's fused kernel.

    Returns:
        Transformer Engine's choice, or None if the run does not use its attention.
    """
    if not wants_te_attention(config):
        return None
    choice = attention_choice(config)
    if choice.chosen != "FusedAttention":
        raise ConfigError(
            f"Transformer Engine would compute attention by {choice.chosen or 'no backend at all'}, not by "
            "its fused kernel; set precision.attention=split and precision.fp8_attention=false, or mend "
            "what it names:\n"
            + "\n".join(f"  - {reason}" for reason in choice.reasons or ("(it gave no reason)",))
        )
    return choice


def _attention_parameters(utils: Any, config: RunConfig) -> Any:
    """Return the question to Transformer Engine, with the fields that the installed version has."""
    model, parallel = config.model, config.parallel
    ranks, length = parallel.tensor * parallel.context, config.train.sequence_length
    fp8 = config.precision.fp8_attention
    known = {
        "qkv_dtype": torch.bfloat16,
        "qkv_layout": "sbhd_sbhd_sbhd",
        "batch_size": config.train.micro_batch_rows,
        "num_heads": model.num_heads // ranks,
        "num_gqa_groups": max(derive.num_kv_heads(model) // ranks, 1),
        "max_seqlen_q": length,
        "max_seqlen_kv": length,
        "head_dim_qk": derive.head_size(model),
        "head_dim_v": derive.head_size(model),
        "attn_mask_type": "causal",
        "softmax_scale": derive.head_size(model) ** -0.5,
        "cuda_graph": parallel.cuda_graphs,
        "window_size": (-1, 0),
        "bottom_right_diagonal": False,
        "core_attention_bias_shape": None,
        "core_attention_bias_requires_grad": False,  # by default true: no deterministic kernel
        "deterministic": config.precision.deterministic,
        "is_training": True,
        "fp8": fp8,
        "fp8_meta": {"recipe": _attention_recipe()} if fp8 else None,
    }
    names = {field.name for field in fields(utils.AttentionParams)}
    return utils.AttentionParams(**{n: value for n, value in known.items() if n in names})


def _attention_recipe() -> Any:
    """Return the recipe of FP8 attention, which does not depend on that of the linear layers."""
    recipe: Any = importlib.import_module("transformer_engine.common.recipe")
    return recipe.DelayedScaling(fp8_format=recipe.Format.HYBRID, fp8_dpa=True)


@contextmanager
def _said_by(utils: Any) -> Iterator[list[str]]:
    """Collect what Transformer Engine logs while it chooses, since it returns no reasons."""
    said: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("Disabling"):
                said.append(record.getMessage())

    logger, settings = logging.getLogger("DotProductAttention"), utils.AttentionLogging
    before = settings._log_level, logger.level, logger.propagate, logger.handlers
    collect: list[logging.Handler] = [Collect()]
    # This replaces its own handler, which prints, and which its first layer adds.
    settings._log_level, logger.propagate, logger.handlers = logging.DEBUG, False, collect
    try:
        yield said
    finally:
        settings._log_level, level, logger.propagate, logger.handlers = before
        logger.setLevel(level)


def _cudnn_version() -> Version:
    utils: Any = importlib.import_module("transformer_engine.pytorch.utils")
    return tuple(utils.get_cudnn_version())


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
