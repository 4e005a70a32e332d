"""Check that an exported folder is the model of its checkpoint: structure and numbers, in float32.

In bfloat16 even a norm eps ten times too large would go unnoticed; in float32 the smallest mistake tried is
a thousand times above rounding. Letter: L = tokens in a row.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_eso.config.schema import ModelConfig
from megatron_eso.errors import CheckpointError
from megatron_eso.export.describe import FACTS, read_facts
from megatron_eso.export.hf.decoding_esolm import diffusion_counts, row_order
from megatron_eso.export.mapping import rules
from megatron_eso.export.reference import Read, Row, reference_logits
from megatron_eso.export.source import DTYPES, open_source
from megatron_eso.export.streamed import ExportedTensors, StreamedModel

LIMIT_LOGITS, LIMIT_KL, LIMIT_CACHE = 1e-4, 1e-8, 1e-3
_ROWS, _LENGTH = 2, 24
# Steps of several tokens, then one token at a time; few steps, since each reads every weight.
_PLAN: dict[str, Any] = {"alpha_0": 0.9, "num_steps": 2, "seed": 2}


@dataclass(frozen=True)
class Verified:
    """What was found; see :meth:`failures`."""

    canvas_relative_logits: float
    canvas_kl: float
    canvas_same_argmax: float
    doubled_relative_logits: float
    doubled_kl: float
    doubled_same_argmax: float
    cached_against_uncached_nats: float
    generated_against_reference_nats: float
    tensors: int

    def failures(self) -> list[str]:
        """Return which results miss their limits; empty if the export is right."""
        found = []
        for name, value in asdict(self).items():
            limit = None
            if name.endswith("logits"):
                limit = LIMIT_LOGITS
            elif name.endswith("kl"):
                limit = LIMIT_KL
            elif name.endswith("nats"):
                limit = LIMIT_CACHE
            if limit is not None and not value <= limit:
                found.append(f"{name} = {value:.2e}, limit {limit:g}")
            if name.endswith("argmax") and value < 1:
                found.append(f"{name} = {value:.4f}, must be 1")
        return found


def verify_export(folder: Path, model: ModelConfig, read: Read, *, seed: int = 0) -> Verified:
    """Return the differences between an exported folder and the tensors it was made from.

    Args:
        folder: exported folder.
        model: the source's shape.
        read: the source's tensors, rounded to the exported dtype, as float32.
        seed: seed of the rows.

    Raises:
        CheckpointError: if a tensor is missing, unknown, misshapen or not finite.
    """
    count = _structure(folder, model)
    exported = StreamedModel(folder)
    length = min(_LENGTH, model.max_length)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.vocab_size - 1, (_ROWS, length), generator=generator)
    is_masked = torch.rand(_ROWS, length, generator=generator) < 0.5
    is_masked[:, 0] = True
    key = torch.rand(_ROWS, length, generator=generator, dtype=torch.float64)
    order = (key + is_masked.double()).argsort(dim=1)
    prompt = tokens[:1, : length // 2]
    canvas, doubled, cached, uncached = exported.in_step(
        [
            lambda theirs: _canvas(theirs, tokens, is_masked, order),
            lambda theirs: _doubled(theirs, tokens, order),
            lambda theirs: _generated(theirs, prompt, length, use_cache=True),
            lambda theirs: _generated(theirs, prompt, length, use_cache=False),
        ]
    )
    row, places = generated_row(model, cached.sequences[0], prompt.shape[1])
    with torch.no_grad():
        expected = reference_logits(model, read, [*_inputs(model, tokens, is_masked, order), row])
    masked = zip(expected[:_ROWS], _in_order(is_masked, order), strict=True)
    of_masks = torch.cat([logits[mask] for logits, mask in masked])
    return Verified(
        *_compare(canvas[is_masked], of_masks[_undo(is_masked, order)]),
        *_compare(*_of_copies(doubled, expected[_ROWS:-1], order)),
        _cache_difference(cached, uncached),
        _generation_difference(cached, expected[-1], places),
        count,
    )


def verify_folder(folder: Path, against: Path | None) -> Verified:
    """Return the differences between an exported folder and its checkpoint.

    Raises:
        CheckpointError: if either cannot be read.
    """
    facts = read_facts(folder)
    if not facts:
        raise CheckpointError(
            f"{folder} holds no {FACTS}: it is not an export of this program; to compare a checkpoint with "
            "the official code, give its numbers with --expected FILE"
        )
    if facts["dtype"] not in DTYPES:
        raise CheckpointError(f"{folder / FACTS}: dtype={facts['dtype']} is unknown; export again")
    if against is None and not Path(facts["source"]).exists():
        raise CheckpointError(
            f"{folder} was made from {facts['source']}, which no longer exists; say where that checkpoint "
            "is now with --against FOLDER"
        )
    source = open_source(against or Path(facts["source"]), use_ema=facts["weights"] == "ema")
    dtype = DTYPES[facts["dtype"]]
    return verify_export(folder, source.model, rounded(source.read, dtype))


def _structure(folder: Path, model: ModelConfig) -> int:
    """Return the number of tensors; refuse missing, unknown and non-finite ones."""
    tensors = ExportedTensors(folder)
    expected = {
        name.format(layer)
        for rule in rules(model)
        for layer in (range(model.num_layers) if rule.is_layered else [0])
        for name in rule.theirs
    }
    wrong = [f"{name} is missing" for name in sorted(expected - set(tensors.files))]
    wrong += [f"{name} is unknown" for name in sorted(set(tensors.files) - expected)]
    for name in sorted(expected & set(tensors.files)):
        # Minimum and maximum are finite only if all values are, and need no extra memory.
        if not all(bool(torch.isfinite(end)) for end in tensors.read(name).aminmax()):
            wrong.append(f"{name} holds values that are not finite")
    if wrong:
        raise CheckpointError(f"{folder} is not a whole model:\n  - " + "\n  - ".join(wrong))
    return len(expected)


def _canvas(exported: Any, tokens: Tensor, is_masked: Tensor, order: Tensor) -> Tensor:
    mask_id = exported.config.mask_token_id
    return exported(input_ids=tokens.masked_fill(is_masked, mask_id), order=order).logits


def _doubled(exported: Any, tokens: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    everything = torch.ones_like(tokens, dtype=torch.bool)
    return exported.predict_in_order(tokens, everything, order, everything)


def _generated(exported: Any, prompt: Tensor, length: int, *, use_cache: bool) -> Any:
    """Return the output of greedy generation after a prompt, with log-probabilities."""
    return exported.generate(
        prompt, max_new_tokens=length - prompt.shape[1], use_cache=use_cache, do_sample=False,
        return_dict_in_generate=True, eos_token_id=None, **_PLAN,
    )  # fmt: skip


def _inputs(model: ModelConfig, tokens: Tensor, is_masked: Tensor, order: Tensor) -> list[Row]:
    """Return the canvas rows, then the doubled rows, each with explicit visibility."""
    length = tokens.shape[1]
    place = torch.arange(length)
    earlier, own = place[:, None] > place, torch.eye(length, dtype=torch.bool)
    nothing = torch.zeros_like(own)
    visible = torch.cat(
        [torch.cat([earlier | own, nothing], dim=1), torch.cat([earlier, own], dim=1)]
    )
    mask_id = model.vocab_size - 1
    canvas, doubled = [], []
    for row in range(len(tokens)):
        o = order[row]
        masked = torch.where(is_masked[row], mask_id, tokens[row])[o]
        canvas.append(Row(masked, o, earlier | own))
        both = torch.cat([tokens[row][o], torch.full_like(o, mask_id)])
        doubled.append(Row(both, torch.cat([o, o]), visible))
    return canvas + doubled


def generated_row(model: ModelConfig, tokens: Tensor, num_given: int) -> tuple[Row, Tensor]:
    """Return all steps of a generated row [L] as one row, and the masks' places.

    The row has the true tokens, then the masks. A mask sees the given tokens, the true tokens decided in
    earlier steps, the masks before it in its own step, and itself.
    """
    length = len(tokens)
    is_open = [place >= num_given for place in range(length)]
    plan = {"num_steps": _PLAN["num_steps"], "method": "binomial", "seed": _PLAN["seed"]}
    counts = diffusion_counts(length - num_given, alpha_0=_PLAN["alpha_0"], **plan)
    order = row_order(is_open, num_diffusion=sum(counts), row=0, **plan)
    counts += [1] * (len(order) - sum(counts))
    places = torch.tensor(order)
    step = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    slot = torch.arange(length)
    step_of_true = torch.cat([torch.full((num_given,), -1), step])
    sees_true = step_of_true[None, :] < step[:, None]
    sees_mask = (step[None, :] == step[:, None]).tril()
    of_true = torch.cat(
        [slot[:, None] >= slot, torch.zeros(length, len(order), dtype=torch.bool)], 1
    )
    entries = torch.cat([torch.arange(num_given), places])
    masks = torch.full_like(places, model.vocab_size - 1)
    visible = torch.cat([of_true, torch.cat([sees_true, sees_mask], dim=1)])
    return Row(torch.cat([tokens[entries], masks]), torch.cat([entries, places]), visible), places


def _in_order(values: Tensor, order: Tensor) -> list[Tensor]:
    return [v[o] for v, o in zip(values, order, strict=True)]


def _undo(is_masked: Tensor, order: Tensor) -> Tensor:
    """Return where each masked entry, taken in reading order, stands among the masked entries in order."""
    found, offset = [], 0
    for mask, o in zip(is_masked, order, strict=True):
        places = o[mask[o]]
        found.append(places.argsort() + offset)
        offset += len(places)
    return torch.cat(found)


def _of_copies(
    theirs: tuple[Tensor, Tensor, Tensor], expected: list[Tensor], order: Tensor
) -> tuple[Tensor, Tensor]:
    logits, row, place = theirs
    slot = order.argsort(dim=1)
    wanted = [
        expected[r][order.shape[1] + slot[r, p]]
        for r, p in zip(row.tolist(), place.tolist(), strict=True)
    ]
    return logits, torch.stack(wanted)


def _compare(found: Tensor, expected: Tensor) -> tuple[float, float, float]:
    """Return the largest relative logit difference, the largest KL in nats, the share of equal argmaxes."""
    real = torch.isfinite(expected[0])
    if not torch.equal(torch.isfinite(found[0]), real):
        return float("inf"), float("inf"), 0.0
    a, b = found[:, real].double(), expected[:, real].double()
    if not bool(torch.isfinite(a).all()):
        return float("inf"), float("inf"), 0.0
    p, q = torch.log_softmax(b, dim=1), torch.log_softmax(a, dim=1)
    kl = float((p.exp() * (p - q)).sum(1).abs().max())
    # A tie within rounding does not count as a difference.
    best = b.max(1).values
    chosen = b.gather(1, a.argmax(1)[:, None])[:, 0]
    same = (best - chosen) <= 2 * LIMIT_LOGITS * b.abs().max()
    return float((a - b).abs().max() / b.abs().max()), kl, float(same.double().mean())


def _cache_difference(cached: Any, uncached: Any) -> float:
    """Return the largest difference in log-probability between cached and uncached generation."""
    if not torch.equal(cached.sequences, uncached.sequences):
        return float("inf")
    return float((cached.log_probs - uncached.log_probs).abs().max())


def _generation_difference(cached: Any, expected: Tensor, places: Tensor) -> float:
    """Return the largest difference in log-probability between cached generation and the reference."""
    tokens = cached.sequences[0][places]
    log_probs = torch.log_softmax(expected[-len(places) :].double(), dim=1)
    wanted = log_probs.gather(1, tokens[:, None])[:, 0]
    return float((cached.log_probs[0][places] - wanted).abs().max())


def rounded(read: Callable[[str, int | None], Tensor], dtype: torch.dtype) -> Read:
    """Return a reader whose tensors are rounded to ``dtype`` and returned as float32."""
    return lambda name, layer: read(name, layer).to(dtype).float()
