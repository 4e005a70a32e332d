"""Write a weights-only checkpoint from whole tensors: the last step of importing a foreign model.

One process builds the model at tensor=1, pipeline=1, copies the tensors into it by name and saves it as
training does, so the result loads at any layout.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_eso.checkpoint.facts import facts_of
from megatron_eso.checkpoint.folder import SIDECAR, CheckpointFolder
from megatron_eso.checkpoint.state import WEIGHTS, add
from megatron_eso.checkpoint.strategy import Planner
from megatron_eso.config.schema import ParallelConfig, RunConfig
from megatron_eso.errors import CheckpointError
from megatron_eso.files import write_json, write_whole
from megatron_eso.launch.environment import Ranks
from megatron_eso.model.build import build_chunks, resolve_precision
from megatron_eso.parallel.device import choose_device, start_process_group
from megatron_eso.parallel.groups import build_groups
from megatron_eso.parallel.parameters import pieces, sharded_parameters

TOKENIZER = "tokenizer.json"


def write_weights(
    path: Path,
    config: RunConfig,
    weights: Mapping[str, Tensor],
    *,
    step: int = 0,
    tokenizer_json: str | None = None,
    origin: Mapping[str, Any] | None = None,
) -> CheckpointFolder:
    """Write and return a committed checkpoint folder; must run in a single process.

    Args:
        path: folder; must not exist or must be empty.
        config: model, objective and row length of the weights.
        weights: whole tensors by full name (``parallel.parameters.Piece.full_name``).
        step: optimizer steps the weights were trained for.
        tokenizer_json: content of the tokenizer's file, kept beside the weights.
        origin: where the weights came from; goes into esolm.json.

    Raises:
        CheckpointError: if the folder is not empty, names or shapes are not the model's, or several
            processes were started.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} is not empty; choose another folder for the checkpoint")
    ranks = Ranks.from_environment(os.environ)
    if ranks.world_size > 1:
        raise CheckpointError(
            f"importing runs in one process, not {ranks.world_size}; import first, then load the "
            "checkpoint at any layout"
        )
    config = resolve_precision(config, "fp32")
    device = choose_device(ranks.local_rank)
    start_process_group(ranks, device)
    layout = build_groups(ParallelConfig(), seed=0)
    chunks, _ = build_chunks(config, layout, device.torch_device)
    fill(list(chunks), weights)
    state: dict[str, Any] = {}
    for entry in sharded_parameters(chunks):
        add(state, entry, WEIGHTS, entry.data.detach())
    path.mkdir(parents=True, exist_ok=True)
    plan = Planner().plan(state, path)
    results, files = plan.write()
    plan.publish(path, [results])
    if tokenizer_json is not None:
        write_whole(path / TOKENIZER, tokenizer_json)
    facts = facts_of(
        config,
        step=step,
        has_ema=False,
        data={},
        tokenizer=None if tokenizer_json is None else TOKENIZER,
        origin=dict(origin or {}),
    )
    write_json(path / SIDECAR, facts)
    folder = CheckpointFolder(path)
    folder.commit(files)
    return folder


def fill(chunks: list[nn.Module], weights: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into the model; every name must be used and every parameter filled.

    Raises:
        CheckpointError: naming the tensors that are missing, unknown or of another shape.
    """
    found, wrong = set(), []
    with torch.no_grad():
        for piece in pieces(chunks):
            name = piece.full_name
            found.add(name)
            if name not in weights:
                wrong.append(f"{name} is missing")
            elif tuple(weights[name].shape) != piece.global_shape:
                shape = tuple(weights[name].shape)
                wrong.append(f"{name} has shape {shape}, the model wants {piece.global_shape}")
            else:
                piece.data.copy_(weights[name][piece.slices])
    wrong += [f"{name} is unknown to the model" for name in weights if name not in found]
    if wrong:
        raise CheckpointError("the weights do not fit the model:\n  - " + "\n  - ".join(wrong))
