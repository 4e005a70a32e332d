"""What ranks do with Transformer Engine on a CPU (tests/stand_in); see rank_jobs.py.

The real rules refuse Transformer Engine on a CPU; so these jobs give the session the description of an
H100. Everything else is the real path.
"""

import importlib
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from megatron_eso.checkpoint.folder import CheckpointFolder
from megatron_eso.config.precision_rules import Machine, process_environment
from megatron_eso.errors import ConfigError
from megatron_eso.eval.evaluate import evaluate
from megatron_eso.eval.sequence_log_probability import sequence_log_probability
from megatron_eso.parallel.te_adapter import require_fused_attention
from megatron_eso.train import session as session_module
from megatron_eso.train.step import train_step
from tests import rank_jobs
from tests.replaced import replaced

H100 = Machine(
    gpu="NVIDIA H100",
    capability=(9, 0),
    te=(2, 11, 0),
    cudnn=(9, 14, 0),
    dpa_recipe="DelayedScaling",
)
MEGATRON_TE = "megatron.core.extensions.transformer_engine"
_VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")


def on_h100(job: str, overrides: list[str], *args: Any) -> Any:
    """Return what a job of rank_jobs.py returns when the session takes this machine for an H100."""
    for name in _VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(process_environment(rank_jobs.small_config(overrides)))
    with replaced([(session_module, "describe_machine", lambda: H100)]):
        return getattr(rank_jobs, job)(overrides, *args)


def layers(overrides: list[str]) -> dict[str, str]:
    """Return Megatron's class of every part of the first layer that is Transformer Engine's."""
    session = on_h100("make_session", overrides)
    found = {}
    for name, module in session.chunks[0].module.decoder.layers[0].named_modules():
        classes = [c for c in type(module).__mro__ if c.__module__ == MEGATRON_TE]
        if classes:
            found[name] = classes[0].__name__
    return found


def with_buffers(overrides: list[str]) -> dict[str, Any]:
    """Train a step and evaluate; return the losses, the scores and what became of the user buffers."""
    base = _module_base()
    base.destroy_ub()
    session = on_h100("make_session", overrides)
    losses = [train_step(session, rank_jobs.read_rows).loss]
    used_by_step = _uses(base)
    scores = evaluate(
        session.replica, lambda rows: rank_jobs.read_rows(7, rows), num_rows=6, bytes_per_token=4.0
    )
    tokens = rank_jobs.read_rows(7, [0, 1, 2]).tokens[:, : rank_jobs.LENGTH]
    order = torch.arange(rank_jobs.LENGTH).expand_as(tokens)
    one_row = sequence_log_probability(session.replica, tokens[:1], order[:1])
    refusal = ""
    try:
        sequence_log_probability(session.replica, tokens, order)
    except ConfigError as error:
        refusal = str(error)
    uses = _uses(base)
    shapes = {
        (tuple(buffer.shape), buffer.size) for buffer in (base._ub_communicators or {}).values()
    }
    base.destroy_ub()
    return {
        "losses": losses,
        "log_probability": float(one_row),
        "refusal": refusal,
        "scores": [score.nats_per_token for score in scores],
        "shapes": shapes,
        "used_by_step": used_by_step,
        "uses": uses,
    }


def _uses(base: Any) -> dict[tuple[str, str], int]:
    """Return how often each buffer was used, by its layer and pass and by what it holds."""
    buffers = base._ub_communicators or {}
    return {(name, mode.value): buffer.uses for (name, mode), buffer in buffers.items()}


def _module_base() -> Any:
    return importlib.import_module("transformer_engine.pytorch.module.base")


def refused_buffers(overrides: list[str]) -> str:
    """Return what is said where Transformer Engine cannot have the buffers."""
    base = _module_base()
    base.destroy_ub()
    with replaced([(base.tex, "device_supports_multicast", lambda: False)]):
        try:
            on_h100("make_session", overrides)
        except ConfigError as error:
            return str(error)
    return ""


def passes(overrides: list[str], dtype: str) -> dict[str, Any]:
    """Return log-probabilities and gradients of the first step's rows, computed in ``dtype``."""
    session = on_h100("_replica_session", overrides, dtype)
    weights = list(session.chunks[0].parameters())
    for weight in weights:  # where Transformer Engine adds gradients up itself
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
        weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    found = []
    for rows in rank_jobs.stack_of_step(session, 0):
        log_probs = session.chunks[0](rows)
        log_probs.double().sum().backward()
        found.append(log_probs.detach().double())
    for weight in weights:
        if weight.grad_added_to_main_grad:  # type: ignore[attr-defined]
            weight.grad = weight.main_grad.to(weight.dtype)  # type: ignore[attr-defined]
    return {
        "log_probs": torch.cat(found).numpy(),
        "gradients": rank_jobs._gradient_pieces(session),
    }


def without_fp8_state(folder: str) -> None:
    """Leave the FP8 state out of a checkpoint's index, as if it were of a run in bf16."""
    path = Path(folder) / ".metadata"
    if int(os.environ["RANK"]) == 0:
        content = pickle.loads(path.read_bytes())
        kept = content.state_dict_metadata
        content.state_dict_metadata = {k: v for k, v in kept.items() if not k.startswith("fp8.")}
        assert len(kept) > len(content.state_dict_metadata)
        path.write_bytes(pickle.dumps(content))
        CheckpointFolder(Path(folder)).commit()


def attention_choices() -> tuple[str, str]:
    """Return the backend chosen for a legal run, and the refusal of one that would fall back."""
    legal = ["precision.attention=te", "precision.dtype=bf16", "model.head_size=128"]
    config = rank_jobs.small_config(legal)
    for name, value in process_environment(config).items():
        os.environ[name] = value
    choice = require_fused_attention(config)
    os.environ["NVTE_UNFUSED_ATTN"] = "1"  # what a user's shell may have
    try:
        require_fused_attention(rank_jobs.small_config([*legal[:2], "model.head_size=512"]))
    except ConfigError as error:
        return choice.chosen if choice else "", str(error)
    return choice.chosen if choice else "", ""
