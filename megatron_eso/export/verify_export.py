"""Is an exported folder the model of its checkpoint? Compared in float32, structure and numbers.

In bfloat16 even a norm eps ten times too large would not be seen; in float32 the smallest mistake tried is
a thousand times above the rounding. Letters: L = tokens of a row, V = vocabulary.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_eso.config.schema import ModelConfig
from megatron_eso.errors import CheckpointError
from megatron_eso.export.describe import FACTS
from megatron_eso.export.mapping import rules
from megatron_eso.export.reference import Read, Row, reference_logits
from megatron_eso.export.source import DTYPES, open_source
from megatron_eso.export.streamed import ExportedTensors, streamed_model

LIMIT_LOGITS, LIMIT_KL, LIMIT_CACHE = 1e-4, 1e-8, 1e-3
_ROWS, _LENGTH = 2, 24


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
    tensors: int

    def failures(self) -> list[str]:
        """Return what is above its limit; empty if the export is right."""
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
        seed: of the rows.

    Raises:
        CheckpointError: if a tensor is missing, unknown, misshapen or not finite.
    """
    count = _structure(folder, model)
    exported = streamed_model(folder)
    length = min(_LENGTH, model.max_length)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.vocab_size - 1, (_ROWS, length), generator=generator)
    # Places far apart: a wrong rotary base shows most at large distances.
    is_masked = torch.rand(_ROWS, length, generator=generator) < 0.5
    is_masked[:, 0] = True
    key = torch.rand(_ROWS, length, generator=generator, dtype=torch.float64)
    order = (key + is_masked.double()).argsort(dim=1)
    with torch.no_grad():
        canvas, doubled = _theirs(exported, tokens, is_masked, order)
        expected = reference_logits(model, read, _inputs(model, tokens, is_masked, order))
        cached = _cached(exported, tokens[:1], model)
    masked = zip(expected[:_ROWS], _in_order(is_masked, order), strict=True)
    of_masks = torch.cat([logits[mask] for logits, mask in masked])
    first = _compare(canvas[is_masked], of_masks, _undo(is_masked, order))
    second = _compare(*_doubled(doubled, expected[_ROWS:], order), None)
    return Verified(*first, *second, cached, count)


def verify_folder(folder: Path, against: Path | None) -> Verified:
    """Return the differences between an exported folder and its checkpoint.

    Raises:
        CheckpointError: if either cannot be read.
    """
    file = folder / FACTS
    try:
        facts = json.loads(file.read_text())
        source_path, dtype, kind = Path(facts["source"]), DTYPES[facts["dtype"]], facts["weights"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}): {folder} is no export of ours"
        ) from None
    source = open_source(against or source_path, use_ema=kind == "ema")
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
        if not bool(torch.isfinite(tensors.read(name)).all()):
            wrong.append(f"{name} holds values that are not finite")
    if wrong:
        raise CheckpointError(f"{folder} is not a whole model:\n  - " + "\n  - ".join(wrong))
    return len(expected)


def _theirs(
    exported: Any, tokens: Tensor, is_masked: Tensor, order: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    mask_id = exported.config.mask_token_id
    canvas = exported(input_ids=tokens.masked_fill(is_masked, mask_id), order=order).logits
    everything = torch.ones_like(is_masked)
    return canvas, exported.predict_in_order(tokens, everything, order, everything)


def _inputs(model: ModelConfig, tokens: Tensor, is_masked: Tensor, order: Tensor) -> list[Row]:
    """Return the canvas rows, then the doubled rows, each with its visibility written out."""
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


def _in_order(values: Tensor, order: Tensor) -> list[Tensor]:
    return [v[o] for v, o in zip(values, order, strict=True)]


def _undo(is_masked: Tensor, order: Tensor) -> Tensor:
    """Return where each masked entry, in reading order, stands among the rows' entries in order."""
    found, offset = [], 0
    for mask, o in zip(is_masked, order, strict=True):
        places = o[mask[o]]
        found.append(places.argsort() + offset)
        offset += len(places)
    return torch.cat(found)


def _doubled(
    theirs: tuple[Tensor, Tensor, Tensor], expected: list[Tensor], order: Tensor
) -> tuple[Tensor, Tensor]:
    logits, row, place = theirs
    slot = order.argsort(dim=1)
    wanted = [
        expected[r][order.shape[1] + slot[r, p]]
        for r, p in zip(row.tolist(), place.tolist(), strict=True)
    ]
    return logits, torch.stack(wanted)


def _compare(found: Tensor, expected: Tensor, index: Tensor | None) -> tuple[float, float, float]:
    """Return relative largest logit difference, largest KL in nats, share of equal most likely tokens."""
    expected = expected if index is None else expected[index]
    real = torch.isfinite(expected[0])
    if not torch.equal(torch.isfinite(found[0]), real):
        return float("inf"), float("inf"), 0.0
    a, b = found[:, real].double(), expected[:, real].double()
    if not bool(torch.isfinite(a).all()):
        return float("inf"), float("inf"), 0.0
    p, q = torch.log_softmax(b, dim=1), torch.log_softmax(a, dim=1)
    kl = float((p.exp() * (p - q)).sum(1).abs().max())
    # A tie within the rounding is no difference.
    best = b.max(1).values
    chosen = b.gather(1, a.argmax(1)[:, None])[:, 0]
    same = (best - chosen) <= 2 * LIMIT_LOGITS * b.abs().max()
    return float((a - b).abs().max() / b.abs().max()), kl, float(same.double().mean())


def _cached(exported: Any, tokens: Tensor, model: ModelConfig) -> float:
    """Return the largest difference of log-probabilities of cached and uncached generation."""
    half = tokens.shape[1] // 2
    runs = [
        exported.generate(
            tokens[:, :half],
            max_new_tokens=tokens.shape[1] - half,
            alpha_0=0.5,
            num_steps=3,
            seed=1,
            use_cache=use_cache,
            do_sample=False,
            return_dict_in_generate=True,
            eos_token_id=None,
        )
        for use_cache in (True, False)
    ]
    if not torch.equal(runs[0].sequences, runs[1].sequences):
        return float("inf")
    return float((runs[0].log_probs - runs[1].log_probs).abs().max())


def rounded(read: Callable[[str, int | None], Tensor], dtype: torch.dtype) -> Read:
    """Return a reader whose tensors are rounded to ``dtype`` and given as float32."""
    return lambda name, layer: read(name, layer).to(dtype).float()
