"""Initial weights that are the same for every layout: a function of (seed, name, layer)."""

import hashlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from megatron_eso.config.schema import ModelConfig
from megatron_eso.parallel.parameters import Piece, pieces_of, sharded_parameters, shards

_RESIDUAL_OUTPUTS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")


@torch.no_grad()
def initialize(
    chunks: Iterable[nn.Module],
    model: ModelConfig,
    *,
    seed: int,
    optimizer: Any = None,
    draw_on: torch.device | str = "cpu",
) -> None:
    """Fill the weights of this rank's chunks in place, and the optimizer's masters in full precision.

    Matrices and embeddings are normal with standard deviation ``init_std``, or init_std /
    sqrt(2 layers) for the projections that add to the residual stream (GPT-2). Scales are 1, biases
    and shifts 0.

    Args:
        chunks: model chunks of this rank, wrapped or not.
        model: shape and standard deviation.
        seed: same seed, same weights, whatever the layout.
        optimizer: Megatron's optimizer, whose master weights get the values before rounding.
        draw_on: device that draws; a GPU is faster, but draws other numbers than a CPU.
    """
    owned = {} if optimizer is None else shards(optimizer)
    for entry in sharded_parameters(chunks):
        # The parameter may be in FP8, which has no views; so it is filled as a whole.
        values = torch.empty(entry.data.shape, device=entry.data.device)
        for piece in pieces_of(entry, values):
            _fill(piece, model, seed, draw_on)
        entry.data.copy_(values)
        shard = owned.get(entry.data)
        if shard is not None:
            shard.master.copy_(values.reshape(-1)[shard.start : shard.end])


def _fill(piece: Piece, model: ModelConfig, seed: int, draw_on: torch.device | str) -> None:
    if len(piece.global_shape) == 1:
        is_scale = piece.name.endswith("norm.weight") or piece.name.endswith("norm_weight")
        piece.data.fill_(1.0 if is_scale else 0.0)
    else:
        piece.data.copy_(_whole(piece, model, seed, draw_on)[piece.slices])


def _whole(piece: Piece, model: ModelConfig, seed: int, draw_on: torch.device | str) -> Tensor:
    """Return the whole tensor; each rank draws all of it and keeps its slice."""
    std = model.init_std
    if piece.name.endswith(_RESIDUAL_OUTPUTS):
        std /= math.sqrt(2 * model.num_layers)
    digest = hashlib.blake2b(f"{seed}/{piece.full_name}".encode(), digest_size=8).digest()
    generator = torch.Generator(draw_on).manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.empty(piece.global_shape, device=draw_on).normal_(0.0, std, generator=generator)
