"""What ranks do with the stand-in for Transformer Engine (tests/stand_in); see rank_jobs.py.

The stand-in runs on a CPU, where the real rules refuse Transformer Engine; so these jobs give the
session the description of an H100. Everything else is the real path.
"""

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

H100 = Machine(
    gpu="NVIDIA H100",
    capability=(9, 0),
    te=(2, 9, 0),
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
    before, session_module.describe_machine = session_module.describe_machine, lambda: H100
    try:
        return getattr(rank_jobs, job)(overrides, *args)
    finally:
        session_module.describe_machine = before


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
    from transformer_engine.pytorch.module import base  # type: ignore[import-not-found]

    base.destroy_ub()
    session = on_h100("make_session", overrides)
    losses = [train_step(session, rank_jobs.read_rows).loss]
    used_by_step = dict((base.buffers or {}).get("uses", {}))
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
    found = base.buffers
    base.destroy_ub()
    return {
        "losses": losses,
        "log_probability": float(one_row),
        "refusal": refusal,
        "scores": [score.nats_per_token for score in scores],
        "buffers": found,
        "used_by_step": used_by_step,
    }


def refused_buffers(overrides: list[str]) -> str:
    """Return what is said where Transformer Engine cannot have the buffers."""
    from transformer_engine.pytorch.module import base  # type: ignore[import-not-found]

    def fail(**settings: Any) -> None:
        raise AssertionError("no CUDA Multicast")

    before, base.initialize_ub = base.initialize_ub, fail
    try:
        on_h100("make_session", overrides)
    except ConfigError as error:
        return str(error)
    finally:
        base.initialize_ub = before
    return ""


def passes_in_fp64(overrides: list[str]) -> dict[str, Any]:
    """Return log-probabilities and gradients of the first step's rows, computed in fp64."""
    session = on_h100("_replica_session", overrides, "fp64")
    found = []
    for rows in rank_jobs.stack_of_step(session, 0):
        log_probs = session.chunks[0](rows)
        log_probs.sum().backward()
        found.append(log_probs.detach())
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
