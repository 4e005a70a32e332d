"""Compare our model with log-probabilities that the official code computed.

The expected file holds four cases: the diffusion pass, the sequential pass, the exact likelihood in one
pass, and the cached sampler under teacher forcing. Every ``*_sorted`` tensor is in prediction order:
entry j of a row belongs to position ``order[row, j]``. Letters: B = rows, L = tokens, V = vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_eso.errors import CheckpointError
from megatron_eso.eval.full_log_probs import full_log_probs
from megatron_eso.model.replica import Replica
from megatron_eso.objective.noise import loss_weight
from megatron_eso.objective.rows import diffusion_rows, sequential_rows
from megatron_eso.sample.plan import DecodingPlan
from megatron_eso.sample.sampler import Choice, fill_rows

TOLERANCE = 1e-4
_NEEDED = {
    "diffusion": ("x0", "t", "order", "inputs_sorted", "logprobs_sorted", "weighted_nll_per_token"),
    "sequential": ("x0", "order", "inputs_sorted", "logprobs_sorted", "nll_per_token"),
    "likelihood": ("x0", "order", "logprob_per_token_sorted", "logprob_per_sequence"),
    "sampler": ("x0", "order", "counts", "logprobs_sorted"),
}


@dataclass(frozen=True)
class Difference:
    """How far one case is from what was expected."""

    case: str
    largest: float | None
    """Largest absolute difference in nats (a row's total: nats per token). None: not computed here."""
    compared: int
    """Numbers compared."""


def read_expected(path: Path, vocab_size: int) -> dict[str, dict[str, Tensor]]:
    """Return the expected tensors by case.

    Raises:
        CheckpointError: if the file cannot be read, lacks a tensor, or has another vocabulary.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        flat = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    names = [f"{case}.{name}" for case, needed in _NEEDED.items() for name in needed]
    lacking = [name for name in names if name not in flat]
    if lacking:
        raise CheckpointError(f"{path} lacks {', '.join(lacking)}")
    found = flat["diffusion.logprobs_sorted"].shape[2]
    if found != vocab_size:
        raise CheckpointError(
            f"{path} is of a vocabulary of {found} tokens, but the model has {vocab_size}"
        )
    return {
        case: {name: flat[f"{case}.{name}"] for name in needed} for case, needed in _NEEDED.items()
    }


def verify(replica: Replica, expected: Mapping[str, Mapping[str, Tensor]]) -> list[Difference]:
    """Return the difference of every case, the same on every rank; all ranks must call.

    Args:
        replica: the model, at any tensor and pipeline size. The sampler case needs a model without
            interleaving and sequence parallelism and is otherwise left out.
        expected: result of :func:`read_expected`.
    """
    parallel = replica.config.parallel
    can_sample = parallel.virtual_pipeline == 1 and not (parallel.tensor > 1 and parallel.sequence)
    cases: dict[str, Callable[..., list[Tensor]]] = {
        "diffusion": _diffusion,
        "sequential": _sequential,
        "likelihood": _likelihood,
        "sampler": _sampler,
    }
    found = []
    for name, compute in cases.items():
        if name == "sampler" and not can_sample:
            found.append(Difference(name, None, 0))
            continue
        errors = compute(replica, expected[name])
        # A value that is not a number must count as wrong, on whichever rank it arose.
        worst = [e.abs().nan_to_num(nan=torch.inf).max().double().cpu() for e in errors if len(e)]
        count = sum(e.numel() for e in errors)
        result = torch.stack([*worst, torch.zeros((), dtype=torch.float64)]).max()
        both = torch.tensor([float(result), float(count)], dtype=torch.float64)
        both = both.to(replica.device)
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        found.append(Difference(name, float(both[0]), int(both[1])))
    return found


def _diffusion(replica: Replica, case: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the errors of the log-probabilities at every entry, clean ones too, and of the loss."""
    order, objective = case["order"], replica.config.objective
    mask_id = replica.config.model.vocab_size - 1
    is_masked = _in_place(case["inputs_sorted"] == mask_id, order)
    weight = loss_weight(case["t"].double(), alpha_0=objective.alpha_0, eps=objective.noise_eps)
    rows = diffusion_rows(
        case["x0"], torch.ones_like(is_masked), is_masked, order, weight, mask_id=mask_id
    )
    everything = torch.arange(order.numel())
    found = full_log_probs(replica, replace(rows, loss_entries=everything))
    if found is None:
        return []
    found = found.cpu()
    chosen = found[rows.loss_entries].gather(1, rows.loss_targets[:, None])[:, 0]
    nats = -chosen * rows.loss_weights
    expected = case["logprobs_sorted"].flatten(0, 1)[:, :mask_id]
    # The loss is compared unweighted where weights are large, since they would scale rounding errors.
    return [
        found - expected,
        (nats - case["weighted_nll_per_token"].flatten()[rows.loss_entries])
        / rows.loss_weights.clamp(min=1.0),
    ]


def _sequential(replica: Replica, case: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the errors at the masked entries and of their loss."""
    mask_id = replica.config.model.vocab_size - 1
    is_masked = _in_place(case["inputs_sorted"] == mask_id, case["order"])
    found, slots, targets = _sequential_log_probs(replica, case, is_masked)
    if found is None:
        return []
    expected = case["logprobs_sorted"].flatten(0, 1)[slots, :mask_id]
    nats = -found.gather(1, targets[:, None])[:, 0]
    return [found - expected, nats - case["nll_per_token"].flatten()[slots]]


def _likelihood(replica: Replica, case: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the errors of every token's log-probability and of the rows' totals, per token."""
    everything = torch.ones_like(case["x0"], dtype=torch.bool)
    found, slots, targets = _sequential_log_probs(replica, case, everything)
    if found is None:
        return []
    sorted_ = torch.empty(case["x0"].numel(), dtype=found.dtype)
    sorted_[slots] = found.gather(1, targets[:, None])[:, 0]
    sorted_ = sorted_.view(case["x0"].shape)
    totals = sorted_.double().sum(dim=1) - case["logprob_per_sequence"]
    return [sorted_ - case["logprob_per_token_sorted"], totals / sorted_.shape[1]]


def _sequential_log_probs(
    replica: Replica, case: Mapping[str, Tensor], is_masked: Tensor
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return [N, V-1] log-probabilities, their flat places in prediction order, and true tokens."""
    mask_id, order = replica.config.model.vocab_size - 1, case["order"]
    rows = sequential_rows(
        case["x0"], torch.ones_like(is_masked), is_masked, order, mask_id=mask_id
    )
    found = full_log_probs(replica, rows)
    slot_of_position = order.argsort(dim=1)
    slots = rows.loss_rows * order.shape[1] + slot_of_position[rows.loss_rows, rows.loss_positions]
    return (None if found is None else found.cpu()), slots, rows.loss_targets


def _sampler(replica: Replica, case: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the errors of the cached sampler's predictions in the step that decides each entry."""
    plan = DecodingPlan(case["order"], 0, case["counts"].tolist())
    steps: list[Tensor] = []
    choice = Choice(
        forced=case["x0"],
        on_logits=lambda _, logits: steps.append(torch.log_softmax(logits, dim=2).cpu()),
    )
    fill_rows(replica, case["x0"], plan, choice)
    return [torch.cat(steps, dim=1) - case["logprobs_sorted"][:, :, :-1]]


def _in_place(sorted_: Tensor, order: Tensor) -> Tensor:
    """Return values, given in prediction order, in reading order."""
    return torch.empty_like(sorted_).scatter(1, order, sorted_)
