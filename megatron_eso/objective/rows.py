"""Turn data rows into the stack rows that run through the transformer.

Kinds of stack rows (see docs/objective.md):
    D  a row with masks in place, permuted, causal: the diffusion pass; also AR and MDLM rows.
    X  the true tokens of a sequential row, permuted, causal.
    Z  the mask copies of that row, shifted by one slot: slot r holds copy r+1 and the last slot holds
       copy 0. A query in slot r then sees X's slots 0..r through an ordinary causal mask, which is
       exactly what copy r+1 must see besides itself.
A micro-batch is stacked [D...; X...; Z...]; Z row i belongs to X row i.

Letters: B = data rows, R = stack rows, L = tokens in a row, N = entries with loss.
"""

from dataclasses import dataclass, fields, replace
from enum import Enum

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Pattern(Enum):
    """Who sees whom."""

    CAUSAL = "causal"  # D and X rows causal, Z rows as above
    BIDIRECTIONAL = "bidirectional"  # every entry sees all valid entries of its row (MDLM)
    BLOCK = "block"  # X block-causal; Z sees its own block and X's earlier blocks (BD3-LM)


@dataclass(frozen=True)
class StackRows:
    """The model's input for one micro-batch, and where its losses are."""

    tokens: Int[Tensor, "R L"]
    """Input ids."""
    positions: Int[Tensor, "R L"]
    """Place of each entry in reading order: the rotary position."""
    num_diffusion: int
    """Number of D rows; they come first."""
    num_pairs: int
    """Number of X rows; as many Z rows follow them."""
    loss_entries: Int[Tensor, " N"]
    """Flat index row * L + slot of each entry with loss."""
    loss_targets: Int[Tensor, " N"]
    """True token of each such entry."""
    loss_weights: Float[Tensor, " N"]
    """Weight of its negative log-likelihood in the loss."""
    loss_is_sequential: Bool[Tensor, " N"]
    """Whether it belongs to the sequential loss; otherwise to the diffusion loss."""
    loss_rows: Int[Tensor, " N"]
    """Data row of each entry, counted within this micro-batch."""
    loss_positions: Int[Tensor, " N"]
    """Place of each entry in reading order."""
    num_diffusion_tokens: int
    """Valid tokens of the data rows in the diffusion pass."""
    num_sequential_tokens: int
    """Valid tokens of the data rows in the sequential pass."""
    pattern: Pattern = Pattern.CAUSAL
    """Who sees whom."""
    block_size: int = 0
    """Block length of the BLOCK pattern."""
    is_valid: Bool[Tensor, "R L"] | None = None
    """Only for BIDIRECTIONAL and BLOCK rows with padding: entries that others may see."""
    loss_gradient: Float[Tensor, " N"] | None = None
    """Gradient of the step's loss with respect to each entry's log-probability, if known."""


_OF_ENTRIES = (
    "loss_entries", "loss_targets", "loss_weights", "loss_is_sequential", "loss_rows",
    "loss_positions", "loss_gradient",
)  # fmt: skip


def diffusion_rows(
    tokens: Int[Tensor, "B L"],
    is_valid: Bool[Tensor, "B L"],
    is_masked: Bool[Tensor, "B L"],
    order: Int[Tensor, "B L"],
    weight: Float[Tensor, " B"],
    *,
    mask_id: int,
) -> StackRows:
    """Return D rows: masks in place, everything permuted by ``order``, loss on masked entries.

    Padding is never masked, here and in :func:`sequential_rows`.
    """
    inputs = torch.where(is_masked, mask_id, tokens).gather(1, order)
    row, slot = is_masked.gather(1, order).nonzero(as_tuple=True)
    length = tokens.shape[1]
    return StackRows(
        tokens=inputs,
        positions=order,
        num_diffusion=tokens.shape[0],
        num_pairs=0,
        loss_entries=row * length + slot,
        loss_targets=tokens.gather(1, order)[row, slot],
        loss_weights=weight[row].float(),
        loss_is_sequential=torch.zeros_like(row, dtype=torch.bool),
        loss_rows=row,
        loss_positions=order[row, slot],
        num_diffusion_tokens=int(is_valid.sum()),
        num_sequential_tokens=0,
    )


def sequential_rows(
    tokens: Int[Tensor, "B L"],
    is_valid: Bool[Tensor, "B L"],
    is_masked: Bool[Tensor, "B L"],
    order: Int[Tensor, "B L"],
    *,
    mask_id: int,
) -> StackRows:
    """Return X rows and shifted Z rows; loss on the copies of masked entries.

    With everything masked this is the exact likelihood pass of eso-lm section 5.
    """
    num_rows, length = tokens.shape
    true_tokens = tokens.gather(1, order)
    shifted_order = order.roll(-1, dims=1)
    row, slot = is_masked.gather(1, shifted_order).nonzero(as_tuple=True)
    return StackRows(
        tokens=torch.cat([true_tokens, torch.full_like(tokens, mask_id)]),
        positions=torch.cat([order, shifted_order]),
        num_diffusion=0,
        num_pairs=num_rows,
        loss_entries=(num_rows + row) * length + slot,
        loss_targets=true_tokens.roll(-1, dims=1)[row, slot],
        loss_weights=torch.ones_like(row, dtype=torch.float32),
        loss_is_sequential=torch.ones_like(row, dtype=torch.bool),
        loss_rows=row,
        loss_positions=shifted_order[row, slot],
        num_diffusion_tokens=0,
        num_sequential_tokens=int(is_valid.sum()),
    )


def autoregressive_rows(
    tokens: Int[Tensor, "B L1"], is_valid: Bool[Tensor, "B L1"], *, mask_id: int, leading_mask: bool
) -> StackRows:
    """Return rows of the AR baseline from samples of L + 1 tokens.

    Args:
        tokens: [B, L + 1].
        is_valid: [B, L + 1].
        mask_id: id of the mask token, the first input with ``leading_mask``.
        leading_mask: predict tokens 0..L-1 from [mask, 0..L-2]; otherwise tokens 1..L from 0..L-1.
    """
    num_rows, length = tokens.shape[0], tokens.shape[1] - 1
    if leading_mask:
        first = torch.full_like(tokens[:, :1], mask_id)
        inputs, targets = torch.cat([first, tokens[:, : length - 1]], dim=1), tokens[:, :length]
        target_valid, target_start = is_valid[:, :length], 0
    else:
        inputs, targets = tokens[:, :length], tokens[:, 1:]
        target_valid, target_start = is_valid[:, 1:], 1
    row, slot = target_valid.nonzero(as_tuple=True)
    return StackRows(
        tokens=inputs,
        positions=torch.arange(length).expand(num_rows, length),
        num_diffusion=num_rows,
        num_pairs=0,
        loss_entries=row * length + slot,
        loss_targets=targets[row, slot],
        loss_weights=torch.ones_like(row, dtype=torch.float32),
        loss_is_sequential=torch.ones_like(row, dtype=torch.bool),
        loss_rows=row,
        loss_positions=slot + target_start,
        num_diffusion_tokens=0,
        num_sequential_tokens=int(target_valid.sum()),
    )


def join(first: StackRows, second: StackRows) -> StackRows:
    """Return one micro-batch of D rows (``first``) and X, Z rows (``second``)."""
    length = first.tokens.shape[1]
    offset = first.tokens.shape[0] * length

    def both(name: str) -> Tensor:
        return torch.cat([getattr(first, name), getattr(second, name)])

    return StackRows(
        tokens=both("tokens"),
        positions=both("positions"),
        num_diffusion=first.num_diffusion,
        num_pairs=second.num_pairs,
        loss_entries=torch.cat([first.loss_entries, second.loss_entries + offset]),
        loss_targets=both("loss_targets"),
        loss_weights=both("loss_weights"),
        loss_is_sequential=both("loss_is_sequential"),
        loss_rows=torch.cat([first.loss_rows, second.loss_rows + first.num_diffusion]),
        loss_positions=both("loss_positions"),
        num_diffusion_tokens=first.num_diffusion_tokens,
        num_sequential_tokens=second.num_sequential_tokens,
    )


def filled_up(rows: StackRows, num_rows: int) -> StackRows:
    """Return the rows preceded by empty D rows, ``num_rows`` stack rows in all; same losses."""
    missing = num_rows - rows.tokens.shape[0]
    if missing <= 0:
        return rows
    length = rows.tokens.shape[1]
    empty = torch.zeros_like(rows.tokens[:1]).expand(missing, length)
    places = torch.arange(length, device=rows.positions.device).expand(missing, length)
    is_valid = rows.is_valid
    if is_valid is not None:
        is_valid = torch.cat([torch.ones_like(is_valid[:1]).expand(missing, -1), is_valid])
    return replace(
        rows,
        tokens=torch.cat([empty, rows.tokens]),
        positions=torch.cat([places, rows.positions]),
        num_diffusion=rows.num_diffusion + missing,
        loss_entries=rows.loss_entries + missing * length,
        is_valid=is_valid,
    )


def part_of_rows(rows: StackRows, part: int, num_parts: int) -> StackRows:
    """Return every ``num_parts``-th entry of each row, from entry ``part`` on, with its losses.

    Entries are dealt out rather than cut into blocks, because a permuted row ends in its masked
    entries: so all parts have about equally many losses. ``is_valid`` stays whole, since attention
    sees whole rows. Part 0 carries the token counts, so that sums over parts equal those of the whole.
    """
    if num_parts == 1:
        return rows
    length = rows.tokens.shape[1]
    row, slot = rows.loss_entries // length, rows.loss_entries % length
    is_here = slot % num_parts == part
    own = {
        name: value[is_here] for name in _OF_ENTRIES if (value := getattr(rows, name)) is not None
    }
    own["loss_entries"] = (row * (length // num_parts) + slot // num_parts)[is_here]
    return replace(
        rows,
        tokens=rows.tokens[:, part::num_parts].contiguous(),
        positions=rows.positions[:, part::num_parts].contiguous(),
        num_diffusion_tokens=rows.num_diffusion_tokens if part == 0 else 0,
        num_sequential_tokens=rows.num_sequential_tokens if part == 0 else 0,
        **own,
    )


def to_device(rows: StackRows, device: torch.device) -> StackRows:
    """Return the rows with every tensor on the device."""
    if device.type == "cpu":
        return rows
    moved = {
        f.name: getattr(rows, f.name).to(device, non_blocking=True)
        for f in fields(rows)
        if isinstance(getattr(rows, f.name), Tensor)
    }
    return replace(rows, **moved)
