"""What the ranks of a test do: small runs at any layout, returning plain numbers and arrays."""

import hashlib
import logging
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_eso.checkpoint import folder as folder_module
from megatron_eso.checkpoint import load as load_module
from megatron_eso.checkpoint.find import (
    find_checkpoint,
    find_checkpoint_together,
    newest_valid_together,
)
from megatron_eso.checkpoint.load import (
    load_first_weights,
    load_training_state,
)
from megatron_eso.checkpoint.save import Saver
from megatron_eso.checkpoint.state import collect
from megatron_eso.config import derive, load_config
from megatron_eso.config.schema import RunConfig
from megatron_eso.errors import CheckpointError
from megatron_eso.eval import evaluate as evaluate_module
from megatron_eso.eval.evaluate import evaluate
from megatron_eso.launch.environment import Ranks
from megatron_eso.objective.losses import TokenCounts
from megatron_eso.objective.rows import StackRows
from megatron_eso.parallel.exchange import Rows, read_together
from megatron_eso.parallel.groups import seed_dropout
from megatron_eso.parallel.megatron_patches import importing_megatron
from megatron_eso.parallel.optimizer import whole_weights
from megatron_eso.parallel.parameters import (
    gather_full,
    pieces,
    pieces_of,
    sharded_parameters,
    shards,
)
from megatron_eso.train import session as session_module
from megatron_eso.train import step as step_module
from megatron_eso.train.session import Session, build_session
from megatron_eso.train.step import (
    forward_backward,
    global_counts,
    micro_batches_of_rank,
    stack_rows_of_step,
    train_step,
)
from tests.replaced import replaced

with importing_megatron():
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

VOCAB, LENGTH = 61, 16
SMALL = [
    "model.hidden_size=32", "model.num_layers=4", "model.num_heads=4", "model.num_kv_heads=2",
    f"model.vocab_size={VOCAB}", "model.vocab_padding_multiple=64", f"train.sequence_length={LENGTH}",
    "train.steps=20", "train.global_batch_rows=16", "train.micro_batch_rows=4", "train.seed=3",
    "precision.dtype=fp32", "objective.alpha_0=0.5", "optimizer.ema_decay=0.9",
    "optimizer.learning_rate=0.01", "model.init_std=0.1",
]  # fmt: skip


def small_config(overrides: list[str]) -> RunConfig:
    """Return the configuration of the tests' small model."""
    return load_config(None, [*SMALL, *overrides])


def idle_gpus_told(nodes: list[str]) -> list[str]:
    """Return what a run says of idle GPUs where each node shows 4, the ranks being on these nodes."""
    here = nodes[int(os.environ["RANK"])]
    told = [(session_module, "idle_gpus", lambda device, num_ranks: [f"{num_ranks} ranks here"])]
    with replaced([(platform, "node", lambda: here), *told]):
        lines = session_module.choices(make_empty_session([]))
    return [line for line in lines if line.endswith("ranks here")]


def make_session(overrides: list[str]) -> Session:
    """Return a session of the small model on this process's ranks."""
    return build_session(small_config(overrides), Ranks.from_environment(os.environ))


def make_empty_session(overrides: list[str]) -> Session:
    """Return a session whose weights are still to be loaded: all NaN, so that a missing one shows."""
    ranks = Ranks.from_environment(os.environ)
    session = build_session(small_config(overrides), ranks, draw_weights=False)
    with torch.no_grad(), whole_weights(session.chunks):
        for chunk in session.chunks:
            for parameter in chunk.parameters():
                parameter.fill_(torch.nan)
        for shard in shards(session.optimizer).values():
            shard.master.fill_(torch.nan)
        if session.average is not None:
            session.average.restart()
    return session


def read_rows(step: int, rows: list[int]) -> Rows:
    """Return artificial rows, a function of step and row; every third row ends in padding."""
    tokens, valid = [], []
    for row in rows:
        generator = torch.Generator().manual_seed(1000 * step + row)
        tokens.append(torch.randint(0, VOCAB - 1, (LENGTH + 1,), generator=generator))
        valid.append(torch.arange(LENGTH + 1) < (LENGTH - 3 if row % 3 == 2 else LENGTH + 1))
    return Rows(torch.stack(tokens), torch.stack(valid))


def loss_and_gradients(overrides: list[str]) -> dict[str, Any]:
    """Return the two sums of nats and this rank's gradient pieces of the first step."""
    session = make_session(overrides)
    sums, counts = passes_of_step(session, 0)
    return {"sums": sums, "counts": counts, "gradients": _gradients(session)}


def stack_of_step(session: Session, step: int) -> list[StackRows]:
    """Return this rank's micro-batches of a step."""
    batches = micro_batches_of_rank(session)
    numbers = [row for batch in batches for row in batch.rows]
    rows = read_together(
        lambda: read_rows(step, numbers),
        session.layout,
        session.torch_device,
        shape=(len(numbers), LENGTH + 1),
    )
    return stack_rows_of_step(session, rows, batches)


def passes_of_step(session: Session, step: int) -> tuple[tuple[float, float], TokenCounts]:
    """Run a step's passes without its update; return the two sums of nats and the token counts."""
    stack = stack_of_step(session, step)
    counts = global_counts(stack, session)
    return forward_backward(session, stack, counts), counts


def _gradients(session: Session) -> list[tuple[str, tuple, tuple, np.ndarray]]:
    owned, found = shards(session.optimizer), []
    for entry in sharded_parameters(session.chunks):
        shard = owned.get(entry.data)
        part = entry.data.main_grad.view(-1)[shard.start : shard.end] if shard else None
        start = shard.start if shard else 0
        full = gather_full(entry.data, start, part, session.layout.weights_group)
        for piece in pieces_of(entry, full):
            found.append(
                (piece.full_name, piece.global_shape, piece.slices, piece.data.numpy().copy())
            )
    return found


def weights(overrides: list[str]) -> list[tuple[str, tuple, tuple, np.ndarray]]:
    """Return this rank's pieces of the initial weights."""
    return _weights(make_session(overrides))


def _weights(session: Session) -> list[tuple[str, tuple, tuple, np.ndarray]]:
    with whole_weights(session.chunks):
        return [
            (p.full_name, p.global_shape, p.slices, _array(p.data)) for p in pieces(session.chunks)
        ]


def _array(data: torch.Tensor) -> np.ndarray:
    """Return a copy as numpy, which has no bfloat16."""
    data = data.detach().cpu()
    return (data.float() if data.dtype is torch.bfloat16 else data).numpy().copy()


def train(
    overrides: list[str],
    num_steps: int,
    folder: str | None = None,
    save_at: int | None = None,
    load: bool = False,
) -> dict[str, Any]:
    """Train some steps, saving or loading a checkpoint; return losses and final weights."""
    session = make_empty_session(overrides) if load else make_session(overrides)
    if load:
        found = find_checkpoint(Path(str(folder)), hashes=True)
        session.state.step = load_training_state(
            found,
            found.sidecar(),
            session.chunks,
            session.optimizer,
            session.average,
            session.layout.weights_group,
        )
    saver = (
        Saver(Path(str(folder)), session.config.checkpoint, session.torch_device)
        if folder
        else None
    )
    losses = []
    while session.state.step < num_steps:
        losses.append(train_step(session, read_rows).loss)
        if saver and session.state.step == save_at:
            state = collect(
                session.chunks, session.optimizer, session.average, session.layout.weights_group
            )
            saver.save(session.state.step, state, {"step": session.state.step, "has_ema": True})
    if saver:
        saver.finish()
    final = collect(
        session.chunks, session.optimizer, session.average, session.layout.weights_group
    )
    state = {
        f"{entry.key}{index}": entry.data.detach().numpy().copy()
        for index, entry in enumerate(final.values())
    }
    return {"losses": losses, "weights": _weights(session), "state": state}


def found_together(path: str, named: bool) -> dict[str, Any]:
    """Look for a checkpoint on all ranks together; return what was found, hashed and logged."""
    device = make_empty_session([]).torch_device
    hashed, said = [], []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    original = folder_module.hash_file

    def hash_file(path: Path) -> str:
        hashed.append(f"{path.parent.name}/{path.name}")
        return original(path)

    logger = logging.getLogger("megatron_eso.checkpoint.find")
    logger.addHandler(handler)
    folder_module.hash_file = hash_file
    look = find_checkpoint_together if named else newest_valid_together
    try:
        folder = look(Path(path), hashes=True, device=device)
        found = str(folder and folder.path)
    except CheckpointError as error:
        found = str(error)
    finally:
        folder_module.hash_file = original
        logger.removeHandler(handler)
    return {"found": found, "hashed": hashed, "said": said}


def started_from(overrides: list[str], folder: str) -> dict[str, dict[int, np.ndarray]]:
    """Start a run from a checkpoint's weights; return its masters, average and model by parameter."""
    session = make_empty_session(overrides)
    found = find_checkpoint(Path(folder), hashes=True)
    group = session.layout.weights_group
    load_first_weights(found, session.chunks, session.optimizer, session.average, group)
    return _started(session)


def read_of_resume(folder: str, failing_rank: int) -> dict[str, Any]:
    """Resume; return the tensors that this rank read, by name, with their devices, and why it failed."""
    read: list[str] = []
    original = load_module.fill

    def load(reader: Any, wanted: Iterable[Any]) -> None:
        entries = list(wanted)
        read.extend(f"{entry.key} {tuple(entry.global_offset)}" for entry in entries)
        original(reader, entries)
        if torch.distributed.get_rank() == failing_rank:
            raise CheckpointError("it read a damaged file")

    load_module.fill = load  # type: ignore[assignment]
    try:
        train([], 2, folder, None, load=True)
    except CheckpointError as error:
        return {"read": read, "failure": str(error)}
    finally:
        load_module.fill = original
    return {"read": read, "failure": ""}


def started(overrides: list[str]) -> dict[str, dict[int, np.ndarray]]:
    """Start a new run; return its masters, average and model by parameter."""
    return _started(make_session(overrides))


def _started(session: Session) -> dict[str, dict[int, np.ndarray]]:
    masters, average, model = {}, {}, {}
    owned = shards(session.optimizer)
    for index, entry in enumerate(sharded_parameters(session.chunks)):
        model[index] = _array(entry.data.view(-1))
        if entry.data in owned:
            masters[index] = _array(owned[entry.data].master)
            average[index] = _array(session.average.parts[entry.data])
    return {"masters": masters, "average": average, "model": model}


def updates(overrides: list[str], num_steps: int) -> dict[str, Any]:
    """Train some steps; return the optimizer's kind, and the weights with those of AdamW's formula.

    Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, in float64 on this rank's shards.
    """
    session = make_session(overrides)
    config = session.config.optimizer
    owned = list(shards(session.optimizer).items())
    before = [shard.master.detach().double().clone() for _, shard in owned]
    moments = [[torch.zeros_like(x), torch.zeros_like(x)] for x in before]
    for step in range(1, num_steps + 1):
        report = train_step(session, read_rows)
        for (parameter, shard), x, (first, second) in zip(owned, before, moments, strict=True):
            # These are already clipped.
            gradient = parameter.main_grad.view(-1)[shard.start : shard.end].double()
            first.mul_(config.beta1).add_(gradient, alpha=1 - config.beta1)
            second.mul_(config.beta2).addcmul_(gradient, gradient, value=1 - config.beta2)
            decay = config.weight_decay if parameter.dim() > 1 else 0.0
            x.mul_(1 - report.learning_rate * decay)
            scale = (second / (1 - config.beta2**step)).sqrt() + config.eps
            x.sub_(report.learning_rate * first / (1 - config.beta1**step) / scale)
    inner = [each.optimizer for each in session.optimizer.chained_optimizers]
    return {
        "kinds": [type(each).__name__ for each in inner],
        "is_fused": [bool(group["fused"]) for each in inner for group in each.param_groups],
        "weights": [shard.master.detach().double().numpy() for _, shard in owned],
        "expected": [x.numpy() for x in before],
    }


def clipped(overrides: list[str]) -> dict[str, float]:
    """Return the norm of the first step's gradients before and after clipping."""
    session = make_session(overrides)
    report = train_step(session, read_rows)
    parts = [parameter.main_grad for parameter in shards(session.optimizer)]
    return {
        "before": report.grad_norm,
        "after": float(torch.stack([x.norm() for x in parts]).norm()),
    }


def scores(overrides: list[str], num_rows: int) -> list[tuple[str, float, float]]:
    """Return (metric, nats per token, tokens) of artificial held-out rows."""
    session = make_session(overrides)
    found = evaluate(
        session.replica, lambda rows: read_rows(99, rows), num_rows=num_rows, bytes_per_token=2.0
    )
    return [(s.metric, s.nats_per_token, s.num_tokens) for s in found]


def scores_and_bounds(overrides: list[str], num_rows: int) -> tuple[list, list, int]:
    """Return :func:`scores`, the likelihood bounds, and how many passes over all rows the scores took."""
    passed, row_nats = [], evaluate_module.row_nats

    def counted(*arguments: Any) -> Any:
        passed.append(arguments)
        return row_nats(*arguments)

    with replaced(((evaluate_module, "row_nats", counted),)):
        found = scores(overrides, num_rows)
    session = make_session(overrides)
    with torch.no_grad():
        bounds = evaluate_module.likelihood_bounds(
            session.replica,
            lambda rows: read_rows(99, rows),
            session.config.objective,
            num_rows,
            2.0,
        )
    return found, [(s.metric, s.nats_per_token) for s in bounds], len(passed)


def scores_in_full_micro_batches(
    overrides: list[str], num_rows: int, stack_rows: int
) -> list[tuple[str, float, float]]:
    """Return :func:`scores` from micro-batches that are all padded to ``stack_rows``."""
    seen = set()

    def filled_up(rows: StackRows, to: int) -> StackRows:
        filled = whole(rows, to)
        seen.add(len(filled.tokens))
        return filled

    whole = evaluate_module.filled_up
    stand_ins = (
        (derive, "fixed_stack_rows", lambda config: stack_rows),
        (evaluate_module, "filled_up", filled_up),
    )
    with replaced(stand_ins):
        found = scores(overrides, num_rows)
    assert seen == {stack_rows}
    return found


def received(overrides: list[str]) -> tuple[list, list]:
    """Return tokens and validity, on this rank, of a row that the replica's first rank reads."""
    session = make_session(overrides)

    def read() -> Rows:
        return Rows(torch.tensor([[0, 5, 0, 7]]), torch.tensor([[True, True, False, False]]))

    rows = read_together(read, session.layout, session.torch_device, shape=(1, 4))
    return rows.tokens.tolist(), rows.is_valid.tolist()


def read_with_failure(failing_rank: int, kind: str) -> str:
    """Return the message that every rank gets when one rank cannot read its data."""
    from megatron_eso.errors import DataError

    session = make_session([])

    def read() -> Rows:
        if session.ranks.rank == failing_rank:
            raise {"DataError": DataError, "OSError": OSError}[kind]("shard x is gone")
        return read_rows(0, [0])

    try:
        read_together(read, session.layout, session.torch_device, shape=(1, LENGTH + 1))
    except DataError as error:
        return str(error)
    return "no error"


def assemble(parts: list[list[tuple[str, tuple, tuple, np.ndarray]]]) -> dict[str, np.ndarray]:
    """Return whole tensors from the pieces of all ranks."""
    whole: dict[str, np.ndarray] = {}
    for rank_parts in parts:
        for name, shape, slices, data in rank_parts:
            whole.setdefault(name, np.full(shape, np.nan, dtype=np.float32))[slices] = data
    return whole


def model_pass(overrides: list[str], dtype: str) -> dict[str, Any]:
    """Return log-probabilities of the first step's entries, with the rows to which they belong."""
    session = _replica_session(overrides, dtype)
    batches = micro_batches_of_rank(session)
    numbers = [row for batch in batches for row in batch.rows]
    stack = stack_rows_of_step(session, read_rows(0, numbers), batches)
    with torch.no_grad():
        log_probs = [session.chunks[0](rows).double().numpy() for rows in stack]
    fields = ("tokens", "positions", "loss_entries", "loss_targets", "num_diffusion", "num_pairs")
    described = [
        {f: v.numpy() if isinstance(v := getattr(rows, f), torch.Tensor) else v for f in fields}
        for rows in stack
    ]
    return {"log_probs": log_probs, "rows": described, "weights": _weights(session)}


def sequence_log_probs(
    overrides: list[str], tokens: np.ndarray, orders: np.ndarray, dtype: str
) -> np.ndarray:
    """Return [B] exact log-probabilities of rows under given orders, from the single pass."""
    from megatron_eso.objective.rows import sequential_rows

    session = _replica_session(overrides, dtype)
    ids = torch.from_numpy(tokens)
    valid = torch.ones_like(ids, dtype=torch.bool)
    rows = sequential_rows(
        ids, valid, valid, torch.from_numpy(orders), mask_id=session.config.model.vocab_size - 1
    )
    with torch.no_grad():
        log_probs = session.chunks[0](rows).double()
    total = torch.zeros(len(ids), dtype=torch.float64).index_add_(0, rows.loss_rows, log_probs)
    return total.numpy()


def sample_rows(
    overrides: list[str],
    dtype: str,
    given: np.ndarray,
    rows: np.ndarray,
    settings: dict[str, Any],
    choice: dict[str, Any],
) -> dict[str, Any]:
    """Return the rows that the sampler filled, its plan, and the weights."""
    from megatron_eso.sample.plan import make_block_plan, make_plan
    from megatron_eso.sample.sampler import Choice, fill_rows

    session = _replica_session([*overrides, "parallel.sequence=false"], dtype)
    make = make_block_plan if "block_size" in settings else make_plan
    plan = make(torch.from_numpy(given), **settings)
    choice = dict(choice)
    if "forced" in choice:
        choice["forced"] = torch.from_numpy(choice["forced"])
    padding = choice.pop("padding", None)
    padding = None if padding is None else torch.from_numpy(padding)
    result = fill_rows(
        session.replica, torch.from_numpy(rows), plan, Choice(**choice), padding=padding
    )
    return {
        "tokens": result.tokens.cpu().numpy(),
        "log_probs": result.log_probs.cpu().numpy(),
        "order": plan.order.numpy(),
        "counts": plan.counts,
        "num_given": plan.num_given,
        "num_steps": result.num_steps,
        "weights": _weights(session),
    }


def uncached_log_probs(
    overrides: list[str], rows: np.ndarray, order: np.ndarray, counts: list[int], num_given: int
) -> np.ndarray:
    """Return [B, L] log-probabilities of a baseline's steps, each from its own training pass."""
    from megatron_eso.objective.rows import Pattern, StackRows, autoregressive_rows

    session = _replica_session(overrides, "fp64")
    objective, mask_id = session.config.objective, session.config.model.vocab_size - 1
    truth, taken = torch.from_numpy(rows), torch.from_numpy(order)
    number, length = truth.shape
    found = torch.zeros(number, length, dtype=torch.float64)
    everything = torch.ones(number, length + 1, dtype=torch.bool)
    place = torch.arange(length).expand(number, length)
    row = torch.arange(number)[:, None]
    done = num_given
    for count in counts:
        open_ = taken[:, done : done + count]
        state = truth.scatter(1, taken[:, done:], mask_id)
        if objective.name == "ar":
            longer = torch.cat([truth, truth[:, :1]], dim=1)
            stack = autoregressive_rows(longer, everything, mask_id=mask_id, leading_mask=True)
            log_probs = session.chunks[0](stack).double().view(number, length).gather(1, open_)
        else:
            is_block = objective.name == "bd3lm"
            entries = (number * is_block + row) * length + open_
            flat = torch.zeros(entries.numel(), dtype=torch.int64)
            stack = StackRows(
                tokens=torch.cat([truth, state]) if is_block else state,
                positions=torch.cat([place, place]) if is_block else place,
                num_diffusion=0 if is_block else number, num_pairs=number if is_block else 0,
                loss_entries=entries.reshape(-1), loss_targets=truth.gather(1, open_).reshape(-1),
                loss_weights=flat.float(), loss_is_sequential=flat.bool(), loss_rows=flat,
                loss_positions=flat, num_diffusion_tokens=0, num_sequential_tokens=0,
                pattern=Pattern.BLOCK if is_block else Pattern.BIDIRECTIONAL,
                block_size=objective.block_size if is_block else 0,
            )  # fmt: skip
            log_probs = session.chunks[0](stack).double().view(number, count)
        found.scatter_(1, open_, log_probs.detach())
        done += count
    return found.numpy()


def _replica_session(overrides: list[str], dtype: str) -> Session:
    """Return a session without optimizer; only tests use fp64."""
    from dataclasses import replace

    config = small_config(overrides)
    config = replace(config, precision=replace(config.precision, dtype=dtype))  # type: ignore[arg-type]
    ranks = Ranks.from_environment(os.environ)
    return build_session(config, ranks, for_training=False)


def import_official(
    checkpoint: str, out: str, settings: dict[str, Any], mutation: str = ""
) -> dict[str, Any]:
    """Import an official checkpoint; leave out one step of the conversion if requested."""
    from unittest import mock

    import torch.nn.functional

    from megatron_eso.export import import_official as importer
    from megatron_eso.export import official_fold

    modulation, pad = official_fold._modulation, torch.nn.functional.pad

    def without_gates(*args: Any) -> tuple[torch.Tensor, ...]:
        parts = modulation(*args)
        return tuple(torch.ones_like(p) if i in (2, 5) else p for i, p in enumerate(parts))

    def without_shifts(*args: Any) -> tuple[torch.Tensor, ...]:
        parts = modulation(*args)
        return tuple(torch.zeros_like(p) if i in (0, 3) else p for i, p in enumerate(parts))

    patches = {
        "": ("pad", pad),
        "gates": ("_modulation", without_gates),
        "shifts": ("_modulation", without_shifts),
        "heads": ("interleave_heads", lambda qkv, num_heads: qkv),
    }
    with mock.patch.object(official_fold, *patches[mutation]):
        folder, official = importer.import_official(Path(checkpoint), Path(out), **settings)
    return {
        "model": official.model,
        "length": official.sequence_length,
        "weights": {name: tensor.numpy() for name, tensor in official.weights.items()},
        "committed": folder.is_committed,
    }


def verify_official(
    folder: str, expected: str, layout: dict[str, Any], model: dict[str, Any]
) -> list[tuple[str, float | None]]:
    """Return (case, largest difference) for a checkpoint at a layout."""
    from dataclasses import replace

    from megatron_eso.checkpoint.replica import load_replica, run_config_of
    from megatron_eso.config.schema import ParallelConfig
    from megatron_eso.eval.verify import read_expected, verify
    from megatron_eso.model.build import resolve_precision
    from megatron_eso.train.session import start_ranks

    found = find_checkpoint(Path(folder), hashes=True)
    config = run_config_of(found, ParallelConfig(**layout))
    config = replace(config, model=replace(config.model, **model))
    config = resolve_precision(config, "fp32")
    config, device, parts = start_ranks(config, Ranks.from_environment(os.environ))
    replica, _ = load_replica(found, config, parts, device, use_ema=True)
    cases = read_expected(Path(expected), config.model.vocab_size)
    return [(d.case, d.largest) for d in verify(replica, cases)]


def train_from(folder: str, overrides: list[str]) -> list[float]:
    """Return the losses of two steps that start from a checkpoint's weights."""

    from megatron_eso.checkpoint.load import load_weights, require_same_model

    session = make_session(overrides)
    found = find_checkpoint(Path(folder), hashes=True)
    require_same_model(found.path, found.sidecar(), session.config.model)
    load_weights(found, session.chunks, use_ema=True)
    session.optimizer.reload_model_params()
    return [train_step(session, read_rows).loss for _ in range(2)]


def log_probability_gradient(
    overrides: list[str],
    tokens: np.ndarray,
    orders: np.ndarray,
    valid: np.ndarray,
    weights: list[float],
) -> dict[str, Any]:
    """Return values, gradient pieces and a finite difference of a weighted sum of log p(row | order)."""
    from megatron_eso.eval.sequence_log_probability import (
        accumulate_gradients,
        sequence_log_probability,
    )

    session = _replica_session(overrides, "fp64")
    ids, order, is_valid = (torch.from_numpy(x) for x in (tokens, orders, valid))
    factor = torch.tensor(weights, dtype=torch.float64)

    def passes() -> torch.Tensor:
        return accumulate_gradients(
            session.replica, ids, order, lambda found, rows: (factor[rows] * found).sum(),
            micro_batch_rows=2, is_valid=is_valid,
        )  # fmt: skip

    values = passes()
    gradients = _gradient_pieces(session)
    direct = None
    if session.layout.pipeline_size == 1:
        for chunk in session.chunks:
            chunk.zero_grad()
        found = sequence_log_probability(session.replica, ids, order, is_valid)
        (factor * found).sum().backward()
        direct = {"values": found.detach().numpy(), "gradients": _gradient_pieces(session)}
    ends, step = [], 1e-5
    for move in (step, -2 * step):
        with torch.no_grad():
            for piece in pieces(session.chunks):
                piece.data.add_(move * direction(piece.full_name, piece.global_shape)[piece.slices])
        ends.append(float((factor * passes()).sum()))
    slope = (ends[0] - ends[1]) / (2 * step)
    return {"values": values.numpy(), "gradients": gradients, "slope": slope, "direct": direct}


def direction(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a fixed direction in which to move a weight, the same in every layout."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _gradient_pieces(session: Session) -> list[tuple[str, tuple, tuple, np.ndarray]]:
    if (
        session.layout.context_size > 1
    ):  # the sum that training takes over ranks that hold the same weights
        for entry in sharded_parameters(session.chunks):
            torch.distributed.all_reduce(entry.data.grad, group=session.layout.context_group)
    return [
        (p.full_name, p.global_shape, p.slices, p.data.double().numpy().copy())
        for entry in sharded_parameters(session.chunks)
        for p in pieces_of(entry, entry.data.grad)
    ]


def forced_log_probs(overrides: list[str], tokens: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """Return [B, L] log-probabilities that the sampler assigns, one token at a time, in fp64."""
    from megatron_eso.sample.plan import DecodingPlan
    from megatron_eso.sample.sampler import Choice, fill_rows

    session = _replica_session(overrides, "fp64")
    rows = torch.from_numpy(tokens)
    plan = DecodingPlan(torch.from_numpy(orders), 0, [1] * rows.shape[1])
    return fill_rows(session.replica, rows, plan, Choice(forced=rows)).log_probs.numpy()


def export_checkpoint(overrides: list[str], folder: str, earlier_saves: int = 0) -> None:
    """Write a checkpoint of the small model's initial weights and a drifted average, as training does.

    From a run's third save on, Megatron's index holds more; ``earlier_saves`` are made and removed first.
    """
    import shutil
    from dataclasses import asdict

    session = make_session(overrides)
    with torch.no_grad():
        for piece in pieces(session.chunks):  # norms of 1 would hide a swap of two
            piece.data.add_(0.1 * direction(piece.full_name, piece.global_shape)[piece.slices])
    session.optimizer.reload_model_params()
    state = collect(
        session.chunks, session.optimizer, session.average, session.layout.weights_group
    )
    for entry in state.values():  # the kinds of a parameter follow each other, weights first
        if entry.key.startswith("weights."):
            weight = entry.data
        elif entry.key.startswith("ema."):
            entry.data.copy_(0.5 * weight)
    saver = Saver(Path(folder), session.config.checkpoint, session.torch_device)
    sidecar = {
        "format_version": 1, "step": 7, "has_ema": True, "model": asdict(session.config.model),
        "objective": asdict(session.config.objective), "sequence_length": LENGTH,
        "mask_token_id": VOCAB - 1, "data": {}, "tokenizer": None, "parallel": {},
    }  # fmt: skip
    for step in range(7 - earlier_saves, 8):
        saver.save(step, state, {**sidecar, "step": step})
        saver.finish()
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        for step in range(7 - earlier_saves, 7):
            shutil.rmtree(Path(folder) / f"step_{step:010d}", ignore_errors=True)


def sample_rows_of(
    folder: str, cases: list[tuple[np.ndarray, np.ndarray, dict[str, Any], dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Return the rows that the native sampler fills with a checkpoint's raw weights, in fp64, per case.

    Args:
        folder: the checkpoint.
        cases: given positions, rows, settings of the plan, settings of the choice.
    """
    from megatron_eso.checkpoint.load import load_weights
    from megatron_eso.sample.plan import make_plan
    from megatron_eso.sample.sampler import Choice, fill_rows

    session = _replica_session(["model.qk_norm=true", "parallel.sequence=false"], "fp64")
    found = find_checkpoint(Path(folder), hashes=True)
    load_weights(found, session.chunks, use_ema=False)
    results = []
    for given, rows, settings, choice in cases:
        plan = make_plan(torch.from_numpy(given), **settings)
        result = fill_rows(session.replica, torch.from_numpy(rows), plan, Choice(**choice))
        results.append({"tokens": result.tokens.numpy(), "log_probs": result.log_probs.numpy()})
    return results


def load_exported(folder: str, tensor: int) -> tuple[int, float]:
    """Return how often this rank imported an exported folder while loading it, and its weights' sum."""
    from megatron_eso.cli.model_loading import load
    from megatron_eso.export import import_hf as module

    whole, calls = module.import_hf, []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return whole(*arguments)

    module.import_hf = counted
    try:
        loaded = load(Path(folder), use_ema=True, dtype="fp32", tensor=tensor, with_tokenizer=False)
    finally:
        module.import_hf = whole
    weights = loaded.replica.chunks[0].parameters()
    return len(calls), float(sum(weight.detach().double().sum() for weight in weights))


def attention_of_layers(attention: str) -> set[str]:
    """Return the kernel that a model's layers hold for a value of ``precision.attention``."""
    from megatron_eso.model.build import build_chunks, resolve_precision
    from megatron_eso.parallel.device import choose_device, start_process_group
    from megatron_eso.parallel.groups import build_groups

    ranks = Ranks.from_environment(os.environ)
    device = choose_device(ranks.local_rank)
    start_process_group(ranks, device)
    config = resolve_precision(small_config([f"precision.attention={attention}"]), "fp32")
    layout = build_groups(config.parallel, seed=1)
    chunks, _ = build_chunks(config, layout, device.torch_device)
    layers: Any = chunks[0].decoder.layers
    return {layer.self_attention.core_attention.backend for layer in layers}


def fused_swiglu() -> tuple[list, list, list, list]:
    """Return Megatron's fused SwiGLU of some numbers and its gradients, and those of plain SwiGLU."""
    from torch.nn.functional import silu

    make_session([])  # applies the patches, so nothing is compiled
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

    found: list[list] = []
    for way in (lambda x: bias_swiglu_impl(x, None), lambda x: silu(x[..., :3]) * x[..., 3:]):
        x = torch.linspace(-4, 4, 24).view(2, 2, 6).requires_grad_()
        out = way(x)
        (out * torch.arange(12.0).view_as(out)).sum().backward()
        found += [out.tolist(), x.grad.tolist()]  # type: ignore[union-attr]
    return found[0], found[1], found[2], found[3]


def zeros_of_dropout(overrides: list[str]) -> tuple[float, bool]:
    """Return the share of zeros among embedded rows in training, and whether two passes differ."""
    session = make_session(overrides)
    model: Any = session.chunks[0].module
    model.train()
    tokens = torch.arange(2 * LENGTH).reshape(2, LENGTH) % (VOCAB - 1)
    positions = torch.arange(LENGTH).repeat(2, 1)
    embedded = model.embedding(input_ids=tokens, position_ids=None)
    passes = [model.hidden_states(tokens, model.attention_rows(positions)) for _ in range(2)]
    return float((embedded == 0).float().mean()), not torch.equal(*passes)


def states_of_dropout(overrides: list[str], num_steps: int) -> tuple[list[str], list[str]]:
    """Return digests of the states that dropout is drawn from, one a step, and what is logged."""
    session = make_session(overrides)
    found, said = [], []
    watch = logging.Handler()
    watch.emit = lambda record: said.append(record.getMessage())

    def noted(*args: Any) -> None:
        seed_dropout(*args)
        state = get_cuda_rng_tracker().get_states()["model-parallel-rng"]
        found.append(hashlib.sha256(state.numpy().tobytes()).hexdigest())

    logging.getLogger().addHandler(watch)
    try:
        with replaced([(step_module, "seed_dropout", noted)]):
            for _ in range(num_steps):
                train_step(session, read_rows)
    finally:
        logging.getLogger().removeHandler(watch)
    return found, said


def builds_with(name: str, value: str) -> bool:
    """Return whether a session can be built with a variable in the environment."""
    os.environ[name] = value
    try:
        return make_session([]) is not None
    finally:
        os.environ.pop(name, None)


def seconds_that_groups_wait(overrides: list[str]) -> dict[str, float]:
    """Return the number of seconds after which a collective of each group gives up."""
    layout, device = make_session(overrides).layout, torch.device("cpu")
    groups: dict[str, Any] = {
        "all": torch.distributed.group.WORLD,
        "weights": layout.weights_group,
        "context": layout.context_group,
        "replica": layout.replica_group,
    }
    return {
        name: group._get_backend(device).options._timeout.total_seconds()
        for name, group in groups.items()
    }
