"""Fill rows step by step, with the decoder of the model's objective.

For Eso-LM, step k feeds [tokens decided in step k-1; masks of step k]. Queries see everything kept and are
causal inside the segment. So a row costs about 2 L token passes whatever the number of steps, and the
log-probabilities equal those of an uncached pass (tests/test_sampler.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_eso.errors import ConfigError
from megatron_eso.model.replica import Replica
from megatron_eso.objective.randomness import Stream, uniform_rows
from megatron_eso.sample.choose import choose_tokens
from megatron_eso.sample.decoders import make_decoder
from megatron_eso.sample.plan import DecodingPlan

# Logits that are decided together: that takes half a dozen copies of them in float64, 128 MiB each.
_PIECE_ELEMENTS = 2**24


@dataclass(frozen=True)
class Sampled:
    """Rows filled by the sampler."""

    tokens: Tensor
    """[B, L] in reading order."""
    log_probs: Tensor
    """[B, L] log-probability of each decided token under the model (before temperature and nucleus), in
    reading order; 0 for given ones."""
    num_steps: int
    """Steps taken; fewer than planned if all rows ended early."""


@dataclass
class Choice:
    """How tokens are chosen."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    first_row: int = 0
    """Number of the batch's first row, so that a row's text does not depend on its batch."""
    stop_token: int | None = None
    """End once every row has decided this token and has nothing open before it; what is still open
    becomes this token. One given in a prompt ends nothing."""
    forced: Tensor | None = None
    """[B, L] tokens to decide instead of sampling (teacher forcing)."""
    cuda_graphs: bool = True
    """Steps may run from CUDA graphs, where there is a GPU (``sample.graphs``)."""
    on_step: Callable[[int, Tensor], None] = field(default=lambda step, tokens: None)
    """Called after each step with the rows so far."""
    on_logits: Callable[[Tensor, Tensor], None] = field(default=lambda open_, logits: None)
    """Called in each step with the open positions [B, n] and their logits [B, n, V - 1] (without the
    mask token's), before tokens are chosen."""


def fill_rows(
    replica: Replica,
    rows: Tensor,
    plan: DecodingPlan,
    choice: Choice,
    *,
    padding: Tensor | None = None,
) -> Sampled:
    """Return the rows with all open positions of the plan decided, on every rank of the replica.

    Args:
        replica: model without sequence parallelism, at any tensor and pipeline size.
        rows: [B, L] tokens; only those the plan calls given are read.
        plan: order and counts.
        choice: temperature, nucleus, seed.
        padding: [B] columns at the left of each row that do not belong to it (prompts of different
            lengths); they count as given. None: none.

    Raises:
        ConfigError: for an objective or layout that cannot sample this way.
    """
    _check(replica, choice)
    num_rows, length = rows.shape
    device = replica.device
    order, rows = plan.order.to(device), rows.to(device)
    padding = torch.zeros(num_rows, dtype=torch.int64) if padding is None else padding.cpu()
    decoder = make_decoder(replica, plan, padding, cuda_graphs=choice.cuda_graphs)
    padding = padding.to(device)
    tokens = torch.full_like(rows, replica.config.model.vocab_size - 1)
    given = order[:, : plan.num_given]
    tokens.scatter_(1, given, rows.gather(1, given))
    log_probs = torch.zeros(num_rows, length, dtype=torch.float64, device=device)
    # One random number per position, counted from where the row itself begins.
    numbers = range(choice.first_row, choice.first_row + num_rows)
    u = uniform_rows(choice.seed, 0, list(numbers), Stream.SAMPLE_TOKEN, length).to(device)
    fresh, done, step = given, plan.num_given, 0
    for chunk in replica.chunks:
        chunk.eval()
    with torch.no_grad():
        for step, count in enumerate(plan.counts, start=1):
            open_ = order[:, done : done + count]
            logits = decoder.logits(tokens, fresh, open_)
            choice.on_logits(open_, logits)
            found = decide(logits, open_, u.gather(1, open_ - padding[:, None]), choice)
            tokens.scatter_(1, open_, found[0])
            log_probs.scatter_(1, open_, found[1])
            fresh, done = open_, done + count
            choice.on_step(step - 1, tokens)
            if choice.stop_token is not None and _have_ended(
                tokens, given, order[:, done:], choice.stop_token
            ):
                tokens.scatter_(1, order[:, done:], choice.stop_token)
                break
    return Sampled(tokens, log_probs, step)


def _have_ended(tokens: Tensor, given: Tensor, still_open: Tensor, stop_token: int) -> bool:
    """Return whether every row's first decided stop token stands before all its open positions."""
    if not still_open.shape[1]:
        return False
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    is_stop = (tokens == stop_token).scatter(1, given, False)
    first_stop = torch.where(is_stop, columns, tokens.shape[1]).amin(dim=1)
    return bool((first_stop < still_open.amin(dim=1)).all())


def decide(logits: Tensor, open_: Tensor, u: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    """Return tokens, sampled or forced, and their log-probabilities under the model, both [B, n].

    Args:
        logits: [B, n, V].
        open_: [B, n] columns that are decided.
        u: [B, n] uniform in [0, 1).
        choice: temperature, nucleus, or the tokens to force.
    """
    flat, numbers = logits.flatten(0, 1), u.flatten()
    forced = (
        None if choice.forced is None else choice.forced.to(u.device).gather(1, open_).flatten()
    )
    size = max(_PIECE_ELEMENTS // flat.shape[1], 1)
    tokens, log_probs = [], []
    for first in range(0, len(flat), size):
        part = slice(first, first + size)
        if forced is None:
            picked = choose_tokens(
                flat[part], numbers[part], temperature=choice.temperature, top_p=choice.top_p
            )
        else:
            picked = forced[part]
        chosen = torch.log_softmax(flat[part].double(), dim=1).gather(1, picked[:, None])
        tokens.append(picked)
        log_probs.append(chosen[:, 0])
    return torch.cat(tokens).view(open_.shape), torch.cat(log_probs).view(open_.shape)


def check_choice(choice: Choice) -> None:
    """Refuse a temperature, nucleus or seed out of range.

    Raises:
        ConfigError: naming the setting.
    """
    # Written so that not-a-number is refused.
    if not 0 <= choice.temperature < float("inf") or not 0 < choice.top_p <= 1:
        raise ConfigError(
            f"temperature={choice.temperature} must be a finite number, 0 or above, and "
            f"top_p={choice.top_p} must be in (0, 1]"
        )
    if not 0 <= choice.seed < 2**64:
        raise ConfigError(f"seed={choice.seed} must be in [0, 2**64), the generator's keys")


def _check(replica: Replica, choice: Choice) -> None:
    check_choice(choice)
    config = replica.config
    if config.parallel.virtual_pipeline > 1 or (
        config.parallel.tensor > 1 and config.parallel.sequence
    ):
        raise ConfigError(
            "sampling runs with parallel.virtual_pipeline=1 and parallel.sequence=false; a checkpoint "
            "loads at any layout"
        )
    if config.precision.fp8 != "off":
        raise ConfigError(
            f"precision.fp8={config.precision.fp8}: products in FP8 take multiples of 8 tokens, but "
            "sampling asks for as few as one; load the checkpoint in bf16"
        )
