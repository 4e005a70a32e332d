"""Score held-out rows with a model at any layout.

The NELBO of an Eso-LM row is its sequential term plus its weighted diffusion term (eso-lm section 1), so
every row takes both passes here, each once per repeat; in training it takes one. The likelihood bound
averages exact likelihoods over K orders of the alpha_0 family (section 5).
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from megatron_eso.config import derive
from megatron_eso.config.schema import EvalConfig, ObjectiveConfig
from megatron_eso.errors import ConfigError
from megatron_eso.eval.scores import LogMeanExp, Score, is_power_of_ten, score
from megatron_eso.model.replica import Replica
from megatron_eso.objective.build import Draw, build_rows, predicted
from megatron_eso.objective.deal import MicroBatch
from megatron_eso.objective.order import likelihood_order
from megatron_eso.objective.randomness import Stream, uniform_rows
from megatron_eso.objective.rows import StackRows, filled_up, sequential_rows
from megatron_eso.parallel.exchange import Rows, read_together, rows_of_rank
from megatron_eso.parallel.fp8_state import untouched_scales
from megatron_eso.parallel.schedule import run_micro_batches

METRICS = ("nelbo", "likelihood")
BuildRows = Callable[[Rows, list[int]], StackRows]
_EVAL_SEED = 20250602  # the same for all runs, so that they are compared on the same draws


def evaluate(
    replica: Replica,
    read: Callable[[list[int]], Rows],
    *,
    num_rows: int,
    bytes_per_token: float,
    metrics: Collection[str] = METRICS,
    between: Callable[[], None] = lambda: None,
) -> list[Score]:
    """Return the scores that ``eval`` settings ask for; the same on every rank.

    Args:
        replica: the model; evaluation mode is set and restored.
        read: returns held-out rows by their numbers.
        num_rows: rows to score, numbered from 0.
        bytes_per_token: UTF-8 bytes of text per token.
        metrics: of METRICS; a model whose NELBO is exact has this one score under either name.
        between: called by every rank before each round of micro-batches; it may raise, if on all ranks.

    Raises:
        ConfigError: if a metric does not exist for the objective.
    """
    settings = replica.config.eval
    objective = evaluation_objective(replica.config.objective, settings)
    check_metrics(objective, metrics)
    was_training = [chunk.training for chunk in replica.chunks]
    for chunk in replica.chunks:
        chunk.eval()
    with torch.no_grad(), untouched_scales(replica.chunks):
        scores = []
        given = (replica, read, objective, num_rows, bytes_per_token, between)
        is_exact = is_nelbo_exact(objective)
        if "nelbo" in metrics or is_exact:
            scores.append(nelbo(*given))
        has_bounds = objective.name == "eso" and not is_exact and settings.likelihood_orders
        if "likelihood" in metrics and has_bounds:
            scores += likelihood_bounds(*given)
    for chunk, mode in zip(replica.chunks, was_training, strict=True):
        chunk.train(mode)
    return scores


def check_metrics(objective: ObjectiveConfig, metrics: Collection[str]) -> None:
    """Refuse a metric that an objective does not have.

    Raises:
        ConfigError: naming the ones it has.
    """
    for metric in metrics:
        if metric not in METRICS:
            raise ConfigError(f"metric {metric!r} is not one of {', '.join(METRICS)} or all")
    if objective.name in ("mdlm", "bd3lm") and "nelbo" not in metrics:
        raise ConfigError(
            f"a model of objective.name={objective.name} has no exact likelihood under an order, only "
            "the NELBO; ask for --metric nelbo"
        )


def check_request(
    objective: ObjectiveConfig, metrics: Collection[str], alpha_0: float | None
) -> None:
    """Refuse metrics, or an alpha_0 to score with, that an objective does not have.

    Raises:
        ConfigError: naming what it has, or the option to leave out.
    """
    check_metrics(objective, metrics)
    if alpha_0 is not None and objective.name != "eso":
        raise ConfigError(
            f"--alpha-0 {alpha_0}: a model of objective.name={objective.name} has no alpha_0 to score "
            "with; leave it out"
        )


def unused_options(
    objective: ObjectiveConfig, *, orders: int | None, repeats: int | None, eps: float | None
) -> list[str]:
    """Return a line for each option that was given and changes nothing for an objective.

    Args:
        objective: as it is evaluated, with the evaluation's alpha_0.
        orders: of the likelihood bound; here and below, None: not given.
        repeats: of the NELBO.
        eps: lower end of the NELBO's times.
    """
    is_exact = is_nelbo_exact(objective)
    what = f"a model of objective.name={objective.name}"
    if objective.name == "eso":
        what += f" at alpha_0={objective.alpha_0:g}"
    lines = []
    if orders and (is_exact or objective.name != "eso"):
        why = "has an exact likelihood, not a bound" if is_exact else "has no likelihood bound"
        lines.append(f"--orders {orders} does nothing: {what} {why}")
    for name, value in (("repeats", repeats), ("eps", eps)):
        if is_exact and value is not None:
            lines.append(f"--{name} {value} does nothing: {what} draws no times")
    return lines


def evaluation_objective(objective: ObjectiveConfig, settings: EvalConfig) -> ObjectiveConfig:
    """Return the objective with the NELBO's loss weight and the evaluation's alpha_0 and times."""
    alpha_0 = objective.alpha_0 if settings.alpha_0 is None else settings.alpha_0
    return replace(objective, loss_weight="elbo", alpha_0=alpha_0, noise_eps=settings.noise_eps)


def is_nelbo_exact(objective: ObjectiveConfig) -> bool:
    """Return whether the NELBO draws nothing, because every row is predicted from left to right."""
    return objective.name == "ar" or (objective.name == "eso" and objective.alpha_0 == 0)


def nelbo(
    replica: Replica,
    read: Callable[[list[int]], Rows],
    objective: ObjectiveConfig,
    num_rows: int,
    bytes_per_token: float,
    between: Callable[[], None] = lambda: None,
) -> Score:
    """Return the negative evidence lower bound per token, or the likelihood where that is exact."""
    alpha_0 = objective.alpha_0 if objective.name == "eso" else 1.0
    is_exact = is_nelbo_exact(objective)
    repeats = 1 if is_exact else replica.config.eval.nelbo_repeats
    total = torch.zeros(num_rows, dtype=torch.float64)
    tokens = total
    for repeat in range(repeats):

        def build(rows: Rows, numbers: list[int], repeat: int = repeat) -> StackRows:
            diffusion = numbers if alpha_0 > 0 else []
            sequential = numbers if objective.name == "eso" and alpha_0 < 1 else []
            copies = (1 if diffusion else 0) + (1 if sequential else 0)
            return build_rows(
                rows.tokens.repeat(copies, 1),
                rows.is_valid.repeat(copies, 1),
                MicroBatch(diffusion, sequential),
                objective,
                Draw(_EVAL_SEED, 0, num_rows, repeat),
                mask_id=replica.config.model.vocab_size - 1,
            )

        per_row = derive.nelbo_stack_rows(objective)
        nats, tokens = row_nats(replica, read, build, num_rows, per_row, between)
        total = total + nats / repeats
    return score("likelihood" if is_exact else "nelbo", total, tokens, bytes_per_token)


def likelihood_bounds(
    replica: Replica,
    read: Callable[[list[int]], Rows],
    objective: ObjectiveConfig,
    num_rows: int,
    bytes_per_token: float,
    between: Callable[[], None] = lambda: None,
) -> list[Score]:
    """Return - log mean_k p(x | order_k) per token over the first 1, 10, 100, ... and all K orders."""
    orders = replica.config.eval.likelihood_orders
    bound = LogMeanExp()
    scores = []
    for order_number in range(orders):

        def build(rows: Rows, numbers: list[int], k: int = order_number) -> StackRows:
            ids, is_valid = rows.tokens[:, :-1], rows.is_valid[:, :-1]
            order = draw_orders(numbers, is_valid, objective.alpha_0, k)
            mask_id = replica.config.model.vocab_size - 1
            return sequential_rows(ids, is_valid, is_valid, order, mask_id=mask_id)

        nats, tokens = row_nats(replica, read, build, num_rows, 2, between)
        bound.add(-nats)
        if bound.count == orders or is_power_of_ten(bound.count):
            name = f"likelihood bound, K = {bound.count}"
            scores.append(score(name, -bound.value, tokens, bytes_per_token))
    return scores


def draw_orders(numbers: list[int], is_valid: Tensor, alpha_0: float, k: int) -> Tensor:
    """Return the k-th order of each row: alpha_0 of the positions first, shuffled, then the rest."""
    length = is_valid.shape[1]
    choice = uniform_rows(_EVAL_SEED, 0, numbers, Stream.EVAL_ORDER, 2 * length, draw=k)
    is_diffusion = (choice[:, :length] < alpha_0) & is_valid
    return likelihood_order(is_diffusion, is_valid, choice[:, length:])


def row_nats(
    replica: Replica,
    read: Callable[[list[int]], Rows],
    build: BuildRows,
    num_rows: int,
    stack_rows_per_row: int,
    between: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Return [B] weighted nats and [B] predicted tokens of all rows, float64, the same on every rank."""
    train = replica.config.train
    fixed = derive.fixed_stack_rows(replica.config)
    limit = fixed or replica.config.eval.micro_batch_rows or train.micro_batch_rows
    per_batch = max(limit // stack_rows_per_row, 1)
    layout = replica.layout
    # A pipeline gets as many micro-batches as it has stages, which fills it; interleaving needs that.
    per_round = per_batch * layout.pipeline_size
    rounds = -(-num_rows // (per_round * layout.data_size))
    result = torch.zeros(2, num_rows, dtype=torch.float64, device=replica.device)
    for index in range(rounds):
        between()
        # Every data-parallel rank reads in every round, since all ranks agree on whether a read failed.
        first = (index * layout.data_size + layout.data_rank) * per_round
        numbers = list(range(first, first + per_round))
        rows = _read_padded(replica, read, numbers, num_rows)
        stack = []
        for begin in range(0, per_round, per_batch):
            part = slice(begin, begin + per_batch)
            built = build(Rows(rows.tokens[part], rows.is_valid[part]), numbers[part])
            built = filled_up(built, fixed or 0)
            stack.append(rows_of_rank(built, layout, replica.device))
        nats = _forward(replica, stack, per_batch)
        here = max(min(num_rows - first, per_round), 0)
        if nats is not None and here:
            result[0, first : first + here] = nats[:here]
            if layout.context_rank == 0:
                counted = predicted(rows.is_valid[:here], replica.config.objective)
                result[1, first : first + here] = counted.sum(dim=1)
    torch.distributed.all_reduce(result)
    return result[0].cpu(), result[1].cpu()


def _read_padded(
    replica: Replica, read: Callable[[list[int]], Rows], numbers: list[int], num_rows: int
) -> Rows:
    """Return the rows; numbers beyond the last give empty rows, so that all batches have one shape."""
    shape = (len(numbers), replica.config.train.sequence_length + 1)

    def padded() -> Rows:
        wanted = [n for n in numbers if n < num_rows]
        tokens = torch.zeros(shape, dtype=torch.int64)
        is_valid = torch.zeros(shape, dtype=torch.bool)
        if wanted:
            rows = read(wanted)
            tokens[: len(wanted)], is_valid[: len(wanted)] = rows.tokens, rows.is_valid
        return Rows(tokens, is_valid)

    return read_together(padded, replica.layout, replica.device, shape=shape)


def _forward(replica: Replica, stack: list[StackRows], num_data: int) -> Tensor | None:
    """Return every data row's nats in this context rank's entries; None on ranks that do not report."""

    def forward_step(batches: Iterator[StackRows], model: nn.Module) -> Any:
        rows = next(batches)

        def report(log_probs: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            nats = torch.zeros(num_data, dtype=torch.float64, device=log_probs.device)
            nats.index_add_(0, rows.loss_rows % num_data, (-log_probs * rows.loss_weights).double())
            return nats.sum(), torch.zeros((), dtype=torch.int), {"nats": nats}

        return model(rows), report

    reports = run_micro_batches(
        forward_step,
        stack,
        replica.chunks,
        sequence_length=replica.config.train.sequence_length,
        stack_rows=len(stack[0].tokens),
        forward_only=True,
    )
    if not replica.layout.reports_losses:
        return None
    return torch.cat([r["nats"] for r in reports])
