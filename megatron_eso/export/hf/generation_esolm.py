"""Filling rows step by step, with an exact key/value cache; settings, canvases, streaming.

Step k feeds a segment: [tokens decided in step k-1; masks of step k]. Its queries see all that is kept, and
the segment itself up to their own place. Only the keys of clean tokens are kept. Rows may differ in padding
and in what is open: short segments are padded with entries that no other sees. Every random number is a
function of (seed, row, position), so a row's text does not depend on its batch. It equals that of
``megatron-eso sample``.

Letters: B = rows, P = tokens of a prompt, W = width of the canvas (prompt and new tokens), n = entries of a
segment, T = entries kept before it, g = key/value heads, d = size of a head.
"""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import GenerationConfig
from transformers.utils import ModelOutput, logging

from .decoding_esolm import TOKEN, choose, diffusion_counts, diffusion_share, row_order, uniform

log = logging.get_logger(__name__)

_SETTINGS = {"max_new_tokens", "max_length", "do_sample", "temperature", "top_p", "eos_token_id",
             "pad_token_id", "num_return_sequences", "use_cache", "return_dict_in_generate"}  # fmt: skip
# Settings of other samplers: their neutral values are accepted, anything else is refused.
_NEUTRAL = {"num_beams": (None, 1), "repetition_penalty": (None, 1.0), "top_k": (None, 0),
            "typical_p": (None, 1.0), "min_length": (None, 0), "no_repeat_ngram_size": (None, 0),
            "bad_words_ids": (None,), "num_beam_groups": (None, 1), "penalty_alpha": (None,),
            "min_new_tokens": (None,), "length_penalty": (None, 1.0), "min_p": (None,)}  # fmt: skip
_UNUSED = {"tokenizer", "assistant_model", "synced_gpus", "bos_token_id", "token_type_ids"}
# Entries that a GenerationConfig has about itself.
_ABOUT = {"transformers_version", "_from_model_config"}
_INSTEAD = {"top_k": "top_p", "min_p": "top_p", "stopping_criteria": "eos_token_id",
            "stop_strings": "eos_token_id", "output_scores": "return_dict_in_generate and its log_probs",
            "output_logits": "return_dict_in_generate and its log_probs"}  # fmt: skip


@dataclass
class EsoLMGenerateOutput(ModelOutput):
    """Filled rows."""

    sequences: torch.Tensor | None = None
    """[B, W] tokens."""
    log_probs: torch.Tensor | None = None
    """[B, W] float64 nats of each decided token, without temperature and nucleus; else 0."""
    num_evaluations: int | None = None
    """Forward passes."""


class SegmentCache:
    """Keys and values of clean tokens by layer; those of masks are dropped after their step."""

    def __init__(self):
        self.kept, self.segments = {}, {}

    def update(self, keys, values, layer, *unused, **unused_too):
        """Return the kept keys and values followed by the segment's, [B, g, T + n, d] each.

        Args:
            keys: [B, g, n, d] of the segment.
            values: [B, g, n, d] of the segment.
            layer: number of the layer.
            unused: what transformers passes to its own caches.
            unused_too: the same by name.
        """
        if layer in self.kept:
            keys, values = (
                torch.cat(pair, dim=2)
                for pair in zip(self.kept[layer], (keys, values), strict=True)
            )
        self.segments[layer] = (keys, values)
        return keys, values

    def keep(self, number):
        """Keep the first ``number`` entries of all that :meth:`update` returned, and drop the others.

        Raises:
            RuntimeError: if no layer has called :meth:`update`.
        """
        if not self.segments:
            raise RuntimeError("the model's layers did not use the cache they were given")
        self.kept = {i: (k[:, :, :number], v[:, :, :number]) for i, (k, v) in self.segments.items()}


def _settings(model, given, kwargs):
    """Return the settings: the call's, else those of ``given``, else the model's generation config's."""
    configs = [c for c in (given, model.generation_config) if c is not None]
    _refuse_unknown(configs, kwargs)
    found = dict.fromkeys(_SETTINGS) | {"temperature": 1.0, "top_p": 1.0}
    for config in reversed(configs):
        found |= {n: v for n in _SETTINGS if (v := getattr(config, n, None)) is not None}
    # None asks for the configuration's value. Only for the end token it means none: rows do not end.
    call = {n: v for n, v in kwargs.items() if n in _SETTINGS}
    found |= {n: v for n, v in call.items() if v is not None or n == "eos_token_id"}
    if isinstance(found["eos_token_id"], torch.Tensor):
        found["eos_token_id"] = found["eos_token_id"].flatten().tolist()
    lengths = _lengths(given, kwargs)
    found |= lengths | {"asks_length": bool(lengths)}
    idle = [f"{n}={call[n]}" for n in ("temperature", "top_p") if call.get(n) not in (None, 0, 1)]
    if idle and not found["do_sample"]:
        log.warning_once(
            f"{', '.join(idle)}: no effect without do_sample=True, the likeliest tokens are taken"
        )
    return found


def _lengths(given, kwargs):
    """Return max_new_tokens and max_length if the call or its configuration asks for one; else {}."""
    asked = [(kwargs.get("max_new_tokens"), kwargs.get("max_length"))]
    if given is not None:
        # transformers 4 writes 20 into every configuration: nobody asked for it.
        length = None if given.max_length == GenerationConfig().max_length else given.max_length
        asked.append((given.max_new_tokens, length))
    for new, length in asked:
        if new is not None or length is not None:
            return {"max_new_tokens": new, "max_length": length if new is None else None}
    return {}


def _refuse_unknown(configs, kwargs):
    """Raise a ValueError for settings of other samplers, unless their values turn them off."""
    asked = {}
    for config in reversed(configs):
        asked |= {n: v for n, v in config.to_diff_dict().items() if n not in _ABOUT}
    asked |= kwargs
    wrong = {
        n: v
        for n, v in asked.items()
        if n not in _SETTINGS | _UNUSED
        and not (v is None or v is False or (isinstance(v, list) and not v))
        and v not in _NEUTRAL.get(n, ())
    }
    if wrong:
        told = [
            f"{n}={v}" + (f" (use {_INSTEAD[n]})" if n in _INSTEAD else "")
            for n, v in wrong.items()
        ]
        raise ValueError(
            f"Eso-LM's generate() does not know {', '.join(told)}; it takes alpha_0, num_steps, "
            f"plan, seed, first_row and {', '.join(sorted(_SETTINGS))}"
        )


def _canvas(model, tokens, valid, found):
    """Return [B, W] prompts with masks behind them, and True where there is no padding."""
    new = found["max_new_tokens"]
    has_masks = bool((tokens == model.config.mask_token_id).any())
    if new is None and found["max_length"] is not None:
        new = found["max_length"] - tokens.shape[1]
    if has_masks and not found["asks_length"]:
        new = 0  # infilling
    if new is None or new < 0 or (new == 0 and not has_masks):
        raise ValueError(
            f"nothing to generate: prompts of {tokens.shape[1]} tokens, max_new_tokens={new}; give "
            "max_new_tokens, or put mask tokens into input_ids"
        )
    length = int(valid.sum(1).max()) + new
    if length > model.config.max_position_embeddings:
        raise ValueError(
            f"{length} tokens are more than max_position_embeddings="
            f"{model.config.max_position_embeddings}; shorten the prompt or max_new_tokens"
        )
    masks = torch.full((len(tokens), new), model.config.mask_token_id, device=tokens.device)
    return torch.cat([tokens, masks], 1), torch.cat([valid, torch.ones_like(masks).bool()], 1)


def generate_rows(
    model, inputs=None, generation_config=None, streamer=None, *, input_ids=None, attention_mask=None,
    alpha_0=None, num_steps=None, plan="binomial", seed=None, first_row=0, **kwargs,
):  # fmt: skip
    """Return [B, W] filled rows, or with return_dict_in_generate an :class:`EsoLMGenerateOutput`.

    Args:
        model: the model; it is in evaluation mode meanwhile.
        inputs: [B, P] prompts; mask tokens in them are filled too (infilling).
        generation_config: settings of transformers; those of the call win.
        streamer: gets the tokens of a single row as its decided beginning grows.
        input_ids: the same as ``inputs``.
        attention_mask: [B, P] 0 for padding, on either side; None: there is none.
        alpha_0: expected share of tokens decided by diffusion, in [0, 1]; None: the model's. 0 is left
            to right.
        num_steps: diffusion steps; None: as many as open tokens.
        plan: ``binomial``, ``fixed``, ``strided`` or ``left-to-right``, as in ``megatron-eso sample``;
            strided decides every token by diffusion.
        seed: of everything random; None: drawn from torch's generator.
        first_row: number of the first row, which the random numbers depend on.
        kwargs: max_new_tokens, do_sample, temperature, top_p, eos_token_id, use_cache, ...

    Raises:
        ValueError: for settings that Eso-LM does not have or that do not fit each other, or if nothing is
            to be generated.
    """
    tokens = inputs if input_ids is None else input_ids
    if tokens is None:
        raise ValueError(
            "give input_ids; torch.empty(1, 0, dtype=torch.long) where there is no prompt"
        )
    found = _settings(model, generation_config, kwargs)
    valid = valid_entries(tokens, attention_mask, found["pad_token_id"])
    temperature, top_p = found["temperature"], found["top_p"]
    if (found["do_sample"] and not temperature > 0) or not 0 < top_p <= 1:
        raise ValueError(f"temperature={temperature} must be above 0 and top_p={top_p} in (0, 1]")
    copies = 1 if found["num_return_sequences"] is None else found["num_return_sequences"]
    if copies < 1:
        raise ValueError(f"num_return_sequences={copies} must be at least 1")
    tokens, valid = (x.repeat_interleave(copies, 0) for x in (tokens, valid))
    if streamer is not None and len(tokens) > 1:
        raise ValueError(f"a streamer shows one row, not {len(tokens)}")
    prompt = tokens.shape[1]
    canvas, valid = _canvas(model, tokens, valid, found)
    seed = int(torch.randint(2**31, (1,))) if seed is None else seed
    share = diffusion_share(plan, alpha_0, num_steps, model.config.alpha_0)
    steps = _steps(model, canvas, valid, share, num_steps, plan, seed, first_row)
    was_training = model.training
    model.eval()
    try:
        result = _fill(model, canvas, valid, steps, found, seed, first_row, prompt, streamer)
    finally:
        model.train(was_training)
    return result if found["return_dict_in_generate"] else result.sequences


def valid_entries(tokens, attention_mask, pad, labels=None):
    """Return booleans of the shape of ``tokens``: False for padding.

    Without a mask nothing is padding. A warning says so if some rows, not all, begin or end with ``pad``.

    Args:
        tokens: [B, L] ids.
        attention_mask: [B, L] 0 for padding; None: no padding.
        pad: id of the padding token; None: not known.
        labels: [B, L] labels of training; None: no training.

    Raises:
        ValueError: for wrong shapes, or if labels end in -100 and no mask is given.
    """
    if tokens.dim() != 2:
        raise ValueError(f"input_ids are [rows, tokens], not of shape {tuple(tokens.shape)}")
    if attention_mask is not None:
        if attention_mask.shape != tokens.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids {tuple(tokens.shape)}"
            )
    elif labels is not None and bool(((labels[:, -1:] == -100) & (labels != -100)).any()):
        raise ValueError(
            "rows end in labels of -100 and no attention_mask is given: what stands there would be read as "
            "text that every token sees; give attention_mask, 0 at padding, or 1 throughout if it is text"
        )
    elif pad is not None and tokens.numel():
        is_padded = (tokens[:, [0, -1]] == pad).any(1)  # never all: the longest row has no padding
        if bool(is_padded.any()) and not bool(is_padded.all()):
            log.warning_once(
                f"rows begin or end with pad_token_id={pad} and no attention_mask is given: it is read "
                "as text; give the tokenizer's attention_mask if it is padding"
            )
    return (torch.ones_like(tokens) if attention_mask is None else attention_mask).bool()


def _steps(model, canvas, valid, alpha_0, num_steps, plan, seed, first_row):
    """Return two [B, W]: the step that decides an entry (-1 given, -2 padding), and sort keys in it."""
    is_open = ((canvas == model.config.mask_token_id) & valid).cpu()
    most = int(is_open.sum(1).max())
    if num_steps is not None and not 1 <= num_steps <= most:
        raise ValueError(f"num_steps={num_steps} must be between 1 and the {most} open tokens")
    step_of = torch.full(canvas.shape, -1)
    rank = torch.arange(canvas.shape[1]).repeat(len(canvas), 1)
    for row in range(len(canvas)):
        places = valid[row].cpu().nonzero()[:, 0]
        open_here = is_open[row][places].tolist()
        left = sum(open_here)
        steps = num_steps and min(num_steps, max(left, 1))
        counts = diffusion_counts(left, method=plan, alpha_0=alpha_0, num_steps=steps, seed=seed)
        order = row_order(
            open_here, method=plan, num_diffusion=sum(counts), num_steps=steps, seed=seed,
            row=first_row + row,
        )  # fmt: skip
        where = places[torch.tensor(order, dtype=torch.int64)]
        counts += [1] * (left - sum(counts))
        step_of[row, where] = torch.repeat_interleave(
            torch.arange(len(counts)), torch.tensor(counts, dtype=torch.int64)
        )
        rank[row, where] = torch.arange(left)
    step_of[~valid.cpu()] = -2
    return step_of, rank


def _entries(step_of, rank, lowest, highest, device):
    """Return [B, n] columns of the entries of steps lowest to highest, and which are real."""
    wanted = (step_of >= lowest) & (step_of <= highest)
    width = int(wanted.sum(1).max())
    key = step_of.long() * rank.shape[1] + rank
    key = torch.where(wanted, key, torch.iinfo(torch.int64).max)
    columns = key.argsort(dim=1, stable=True)[:, :width]
    return columns.to(device), wanted.gather(1, columns).to(device)


def _fill(model, canvas, valid, steps, found, seed, first_row, prompt, streamer):
    step_of, rank = steps
    positions = (valid.long().cumsum(1) - 1).clamp(min=0)
    cache = SegmentCache() if found["use_cache"] in (None, True) else None
    kept_ok = torch.zeros(len(canvas), 0, dtype=torch.bool, device=canvas.device)
    log_probs = torch.zeros(canvas.shape, dtype=torch.float64, device=canvas.device)
    num_steps, done, shown = int(step_of.max()) + 1, 0, 0
    # One number per position, counted from where the row itself begins: padding changes no text.
    numbers = range(first_row, first_row + len(canvas))
    draws = np.stack([uniform(seed, 0, row, TOKEN, canvas.shape[1]) for row in numbers])
    draws = torch.from_numpy(draws).to(canvas.device).gather(1, positions)
    shown = _stream(streamer, canvas, step_of, -1, shown, prompt, found["eos_token_id"])
    for step in range(num_steps):
        lowest = -1 if cache is None or step == 0 else step - 1
        fresh, fresh_ok = _entries(step_of, rank, lowest, step - 1, canvas.device)
        open_, open_ok = _entries(step_of, rank, step, step, canvas.device)
        ok = torch.cat([fresh_ok, open_ok], 1)
        places = torch.cat([fresh, open_], 1)
        new = places.shape[1]
        causal = torch.ones(new, new, dtype=torch.bool, device=canvas.device).tril()
        own = torch.eye(new, dtype=torch.bool, device=canvas.device)
        visible = torch.cat(
            [kept_ok[:, None].expand(-1, new, -1), causal & ok[:, None] | own], dim=2
        )
        hidden = model.model(canvas.gather(1, places), positions.gather(1, places), visible, cache)
        if cache is not None:
            cache.keep(kept_ok.shape[1] + fresh.shape[1])
            kept_ok = torch.cat([kept_ok, fresh_ok], 1)
        logits = model.real_logits(hidden[:, fresh.shape[1] :][open_ok])
        row = torch.arange(len(canvas), device=canvas.device)[:, None].expand_as(open_)[open_ok]
        column = open_[open_ok]
        picked = _pick(logits, draws[row, column], found)
        canvas[row, column] = picked
        chosen = torch.log_softmax(logits.double(), dim=1).gather(1, picked[:, None])[:, 0]
        log_probs[row, column] = chosen
        done = step + 1
        shown = _stream(streamer, canvas, step_of, step, shown, prompt, found["eos_token_id"])
        if _all_ended(canvas, step_of, step, prompt, found["eos_token_id"]):
            break
    log_probs[_cut(canvas, prompt, found)] = 0.0
    if streamer is not None:
        streamer.end()
    return EsoLMGenerateOutput(sequences=canvas, log_probs=log_probs, num_evaluations=done)


def _pick(logits, draws, found):
    if not found["do_sample"]:
        return logits.argmax(dim=1)
    return choose(logits, draws, temperature=found["temperature"], top_p=found["top_p"])


def _is_end(tokens, eos):
    if eos is None:
        return torch.zeros_like(tokens, dtype=torch.bool)
    ends = torch.as_tensor(eos if isinstance(eos, (list, tuple)) else [eos], device=tokens.device)
    return torch.isin(tokens, ends)


def _all_ended(canvas, step_of, step, prompt, eos):
    """Return whether every row has an end token behind its prompt and nothing open before it."""
    decided = (step_of <= step).to(canvas.device)
    is_end = _is_end(canvas, eos) & decided
    is_end[:, :prompt] = False
    prefix = decided.long().cumprod(1).bool()
    return bool((is_end & prefix).any(1).all())


def _cut(canvas, prompt, found):
    """Put padding behind the first end token that follows the prompt; return True there, [B, W]."""
    is_end = _is_end(canvas, found["eos_token_id"])
    is_end[:, :prompt] = False
    after = is_end.long().cumsum(1) - is_end.long() > 0
    eos, pad = found["eos_token_id"], found["pad_token_id"]
    if pad is None and eos is not None:
        pad = eos[0] if isinstance(eos, (list, tuple)) else eos
    if pad is not None:
        canvas[after] = pad
    return after


def _stream(streamer, canvas, step_of, step, shown, prompt, eos):
    """Show what is decided without a gap from the start; return how many tokens are shown by now."""
    if streamer is None:
        return 0
    decided = int((step_of[0] <= step).long().cumprod(0).sum())
    if step < 0:
        decided = prompt if decided >= prompt else 0
    ends = _is_end(canvas[0, prompt:decided], eos).nonzero()
    if len(ends):  # what follows will be padding
        decided = prompt + int(ends[0]) + 1
    if decided > shown:
        if (
            shown == 0 and decided > prompt > 0
        ):  # streamers leave out their first portion, the prompt
            streamer.put(canvas[:, :prompt].cpu())
            shown = prompt
        streamer.put(canvas[0, shown:decided].cpu() if shown else canvas[:, :decided].cpu())
    return max(decided, shown)
