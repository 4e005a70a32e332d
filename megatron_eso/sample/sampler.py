"""Fill rows step by step with an exact key/value cache.

Step k feeds [tokens decided in step k-1; masks of step k]; queries see everything kept and are causal
inside the segment, so a row costs about 2 L token passes whatever the number of steps, and the
log-probabilities equal those of an uncached pass (tests/test_sampler.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_eso.errors import ConfigError
from megatron_eso.model.eso_model import EsoModel
from megatron_eso.model.replica import Replica
from megatron_eso.objective.randomness import Stream, uniform
from megatron_eso.sample.cache import Cache
from megatron_eso.sample.choose import choose_tokens
from megatron_eso.sample.plan import DecodingPlan


@dataclass(frozen=True)
class Sampled:
    """Rows filled by the sampler."""

    tokens: Tensor
    """[B, L] in reading order."""
    log_probs: Tensor
    """[B, L] log-probability of each decided token under the model (before temperature and nucleus), in
    reading order; 0 for given ones."""


@dataclass
class Choice:
    """How tokens are chosen."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    first_row: int = 0
    """Number of the batch's first row, so that a row's text does not depend on its batch."""
    forced: Tensor | None = None
    """[B, L] tokens to decide instead of sampling (teacher forcing)."""
    on_step: Callable[[int, Tensor], None] = field(default=lambda step, tokens: None)
    """Called after each step with the rows so far."""
    on_logits: Callable[[Tensor, Tensor], None] = field(default=lambda open_, logits: None)
    """Called in each step with the open positions [B, n] and their logits [B, n, V - 1] (without the
    mask token's), before tokens are chosen."""


def fill_rows(replica: Replica, rows: Tensor, plan: DecodingPlan, choice: Choice) -> Sampled:
    """Decide every position that the plan leaves open.

    Args:
        replica: model without pipeline and sequence parallelism.
        rows: [B, L] tokens; only those the plan calls given are read.
        plan: order and counts.
        choice: temperature, nucleus, seed.

    Raises:
        ConfigError: for an objective or layout that cannot sample this way.
    """
    _check(replica, choice)
    model: EsoModel = replica.chunks[0]  # type: ignore[assignment]
    mask_id = replica.config.model.vocab_size - 1
    num_rows, length = rows.shape
    order = plan.order.to(replica.device)
    tokens = torch.full_like(rows, mask_id)
    given = order[:, : plan.num_given]
    tokens.scatter_(1, given, rows.gather(1, given))
    log_probs = torch.zeros(num_rows, length, dtype=torch.float64, device=replica.device)
    cache = Cache(length + max(plan.counts, default=0))
    fresh, done = given, plan.num_given
    model.eval()
    with torch.no_grad():
        for step, count in enumerate(plan.counts):
            open_ = order[:, done : done + count]
            logits = _segment_logits(model, tokens, fresh, open_, cache, mask_id)
            choice.on_logits(open_, logits)
            picked = _pick(logits, open_, choice)
            tokens.scatter_(1, open_, picked)
            chosen = torch.log_softmax(logits.double(), dim=2).gather(2, picked[:, :, None])
            log_probs.scatter_(1, open_, chosen[:, :, 0])
            fresh, done = open_, done + count
            choice.on_step(step, tokens)
    return Sampled(tokens, log_probs)


def _segment_logits(
    model: EsoModel, tokens: Tensor, fresh: Tensor, open_: Tensor, cache: Cache, mask_id: int
) -> Tensor:
    """Feed the fresh clean tokens and the masks; return [B, count, V] logits of the masks."""
    positions = torch.cat([fresh, open_], dim=1)
    inputs = torch.cat([tokens.gather(1, fresh), torch.full_like(open_, mask_id)], dim=1)
    rows = model.attention_rows(positions, store=cache)
    hidden = model.hidden_states(inputs, rows)
    cache.keep(fresh.shape[1])
    num_rows, new = positions.shape
    slots = torch.arange(new - open_.shape[1], new, device=positions.device)
    entries = torch.arange(num_rows, device=positions.device)[:, None] * new + slots
    logits = gather_vocabulary(model.logits(hidden, entries.reshape(-1)), model.decoder.tp_group)
    return logits[:, :mask_id].view(num_rows, open_.shape[1], mask_id)


def gather_vocabulary(logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return [N, V] from every tensor rank's [N, V/T] columns."""
    if group.size() == 1:
        return logits
    parts = [torch.empty_like(logits) for _ in range(group.size())]
    dist.all_gather(parts, logits.contiguous(), group=group)
    return torch.cat(parts, dim=1)


def _pick(logits: Tensor, open_: Tensor, choice: Choice) -> Tensor:
    """Return [B, count] tokens, sampled or forced."""
    if choice.forced is not None:
        return choice.forced.to(open_.device).gather(1, open_)
    num_rows = open_.shape[0]
    u = torch.stack(
        [
            torch.stack(
                [
                    uniform(choice.seed, position, choice.first_row + row, Stream.SAMPLE_TOKEN, 1)[
                        0
                    ]
                    for position in open_[row].tolist()
                ]
            )
            for row in range(num_rows)
        ]
    )
    flat = choose_tokens(
        logits.reshape(-1, logits.shape[2]),
        u.reshape(-1),
        temperature=choice.temperature,
        top_p=choice.top_p,
    )
    return flat.view(num_rows, -1)


def _check(replica: Replica, choice: Choice) -> None:
    config = replica.config
    if choice.temperature < 0 or not 0 < choice.top_p <= 1:
        raise ConfigError(
            f"temperature={choice.temperature} must not be negative and top_p={choice.top_p} must be in "
            "(0, 1]"
        )
    if config.objective.name != "eso":
        raise ConfigError(
            f"the checkpoint was trained with objective.name={config.objective.name}; this sampler "
            "decodes Eso-LM checkpoints"
        )
    if config.parallel.pipeline > 1 or (config.parallel.tensor > 1 and config.parallel.sequence):
        raise ConfigError(
            "sampling runs with parallel.pipeline=1 and parallel.sequence=false; a checkpoint loads at "
            "any layout"
        )
