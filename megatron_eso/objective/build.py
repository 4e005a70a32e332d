"""One function per objective: data rows of a micro-batch in, stack rows out.

The configuration key ``objective.name`` chooses; everything random comes from (seed, step, row).
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from megatron_eso.config.schema import ObjectiveConfig
from megatron_eso.objective import noise
from megatron_eso.objective.deal import MicroBatch
from megatron_eso.objective.order import prediction_order
from megatron_eso.objective.randomness import Stream, uniform_rows
from megatron_eso.objective.rows import (
    Pattern,
    StackRows,
    autoregressive_rows,
    diffusion_rows,
    join,
    sequential_rows,
)


@dataclass(frozen=True)
class Draw:
    """Where the random numbers of a batch come from, and how times are spread over it."""

    seed: int
    step: int
    num_diffusion_rows: int
    """Diffusion rows of the whole global batch: the number of time strata."""
    repeat: int = 0
    """Index of a repeated draw for the same rows (evaluation)."""


def build_rows(
    tokens: Int[Tensor, "B L1"],
    is_valid: Bool[Tensor, "B L1"],
    micro_batch: MicroBatch,
    objective: ObjectiveConfig,
    draw: Draw,
    *,
    mask_id: int,
) -> StackRows:
    """Return the stack rows of a micro-batch for the configured objective.

    Args:
        tokens: [B, L + 1] samples, in the order of ``micro_batch.rows``.
        is_valid: [B, L + 1], False for padding.
        micro_batch: row numbers in the global batch.
        objective: which rows to build.
        draw: seed, step and number of strata.
        mask_id: id of the mask token.
    """
    if objective.name == "ar":
        return autoregressive_rows(
            tokens, is_valid, mask_id=mask_id, leading_mask=objective.leading_mask
        )
    tokens, is_valid = tokens[:, :-1], is_valid[:, :-1]
    if objective.name == "mdlm":
        return _mdlm(tokens, is_valid, micro_batch.rows, objective, draw, mask_id)
    if objective.name == "bd3lm":
        return _bd3lm(tokens, is_valid, micro_batch.rows, objective, draw, mask_id)
    return _eso(tokens, is_valid, micro_batch, objective, draw, mask_id)


def predicted(samples: Shaped[Tensor, "B L1"], objective: ObjectiveConfig) -> Shaped[Tensor, "B L"]:
    """Return the L of a sample's L + 1 places that its row predicts, from the first or the second on."""
    begins_with_second = objective.name == "ar" and not objective.leading_mask
    return samples[:, 1:] if begins_with_second else samples[:, :-1]


def _eso(
    tokens: Tensor,
    is_valid: Tensor,
    micro_batch: MicroBatch,
    objective: ObjectiveConfig,
    draw: Draw,
    mask_id: int,
) -> StackRows:
    split = len(micro_batch.diffusion_rows)
    parts = []
    if split:
        parts.append(
            _eso_diffusion(
                tokens[:split],
                is_valid[:split],
                micro_batch.diffusion_rows,
                objective,
                draw,
                mask_id,
            )
        )
    if micro_batch.sequential_rows:
        rows, is_valid = micro_batch.sequential_rows, is_valid[split:]
        keep = torch.full((len(rows),), objective.alpha_0, dtype=torch.float64)
        is_masked = _masked(rows, is_valid, keep, draw)
        key = uniform_rows(
            draw.seed, draw.step, rows, Stream.ORDER, is_valid.shape[1], draw=draw.repeat
        )
        order = prediction_order(is_masked, is_valid, key, masked_in_reading_order=True)
        parts.append(sequential_rows(tokens[split:], is_valid, is_masked, order, mask_id=mask_id))
    return parts[0] if len(parts) == 1 else join(*parts)


def _eso_diffusion(
    tokens: Tensor,
    is_valid: Tensor,
    rows: list[int],
    objective: ObjectiveConfig,
    draw: Draw,
    mask_id: int,
) -> StackRows:
    is_masked, weight = _masks_and_weights(is_valid, rows, objective, draw, objective.alpha_0)
    key = uniform_rows(draw.seed, draw.step, rows, Stream.ORDER, tokens.shape[1], draw=draw.repeat)
    order = prediction_order(is_masked, is_valid, key, masked_in_reading_order=False)
    return diffusion_rows(tokens, is_valid, is_masked, order, weight, mask_id=mask_id)


def _mdlm(
    tokens: Tensor,
    is_valid: Tensor,
    rows: list[int],
    objective: ObjectiveConfig,
    draw: Draw,
    mask_id: int,
) -> StackRows:
    is_masked, weight = _masks_and_weights(is_valid, rows, objective, draw, 1.0)
    order = torch.arange(tokens.shape[1]).expand_as(tokens)
    built = diffusion_rows(tokens, is_valid, is_masked, order, weight, mask_id=mask_id)
    visible = None if bool(is_valid.all()) else is_valid
    return replace(built, pattern=Pattern.BIDIRECTIONAL, is_valid=visible)


def _bd3lm(
    tokens: Tensor,
    is_valid: Tensor,
    rows: list[int],
    objective: ObjectiveConfig,
    draw: Draw,
    mask_id: int,
) -> StackRows:
    """Return rows of block diffusion (arXiv 2503.09573): true tokens and a copy noised block by block."""
    num_rows, length = tokens.shape
    size = objective.block_size
    num_blocks = length // size
    strata = [row * num_blocks + block for row in rows for block in range(num_blocks)]
    times = noise.stratified_times(
        draw.seed,
        draw.step,
        strata,
        num_rows=draw.num_diffusion_rows * num_blocks,
        eps=objective.noise_eps,
        draw=draw.repeat,
    )
    eps = objective.noise_eps
    weight = noise.loss_weight(times, alpha_0=1.0, eps=eps)
    if objective.loss_weight == "constant":
        weight = torch.ones_like(weight)
    weight = weight.view(num_rows, num_blocks).repeat_interleave(size, dim=1)
    keep = noise.keep_probability(times, alpha_0=1.0, eps=eps)
    keep = keep.view(num_rows, num_blocks).repeat_interleave(size, dim=1)
    u = uniform_rows(draw.seed, draw.step, rows, Stream.MASK, length, draw=draw.repeat)
    is_masked = (u >= keep) & is_valid
    row, slot = is_masked.nonzero(as_tuple=True)
    positions = torch.arange(length).expand(num_rows, length)
    return StackRows(
        tokens=torch.cat([tokens, torch.where(is_masked, mask_id, tokens)]),
        positions=torch.cat([positions, positions]),
        num_diffusion=0,
        num_pairs=num_rows,
        loss_entries=(num_rows + row) * length + slot,
        loss_targets=tokens[row, slot],
        loss_weights=weight[row, slot].float(),
        loss_is_sequential=torch.zeros_like(row, dtype=torch.bool),
        loss_rows=row,
        loss_positions=slot,
        num_diffusion_tokens=int(is_valid.sum()),
        num_sequential_tokens=0,
        pattern=Pattern.BLOCK,
        block_size=size,
        is_valid=None if bool(is_valid.all()) else is_valid.repeat(2, 1),
    )


def _masks_and_weights(
    is_valid: Bool[Tensor, "B L"],
    rows: list[int],
    objective: ObjectiveConfig,
    draw: Draw,
    alpha_0: float,
) -> tuple[Bool[Tensor, "B L"], Float[Tensor, " B"]]:
    """Return the masks of diffusion rows at their stratified times, and each row's loss weight."""
    eps = objective.noise_eps
    times = noise.stratified_times(
        draw.seed, draw.step, rows, num_rows=draw.num_diffusion_rows, eps=eps, draw=draw.repeat
    )
    keep = noise.keep_probability(times, alpha_0=alpha_0, eps=eps)
    is_masked = _masked(rows, is_valid, keep, draw)
    if objective.loss_weight == "constant":
        return is_masked, torch.ones_like(times)
    return is_masked, noise.loss_weight(times, alpha_0=alpha_0, eps=eps)


def _masked(
    rows: list[int], is_valid: Bool[Tensor, "B L"], keep: Float[Tensor, " B"], draw: Draw
) -> Bool[Tensor, "B L"]:
    u = uniform_rows(draw.seed, draw.step, rows, Stream.MASK, is_valid.shape[1], draw=draw.repeat)
    return (u >= keep[:, None]) & is_valid
