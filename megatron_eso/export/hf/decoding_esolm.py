"""Which positions in which step or order, and which token: the pure part of sampling and scoring.

``megatron_eso.sample`` and the exported model both run this file. It goes beside the weights, so it imports
nothing of the package. Every random number is a function of (seed, row, position), so a row's text does not
depend on its batch.

Letters: B = rows, L = tokens of a row, N = entries, V = vocabulary, T = diffusion steps.
"""

from itertools import pairwise

import numpy as np
import torch
from numpy.random import Philox

# Streams of random numbers, as in megatron_eso.objective.randomness.
ORDER, EVAL_ORDER, PLAN, TOKEN = 3, 4, 5, 6
METHODS = ("binomial", "fixed", "strided", "left-to-right")


def uniform(seed, step, row, stream, count, draw=0):
    """Return [count] float64 numbers in [0, 1), a pure function of the arguments (numpy)."""
    return _numbers(_generator(seed, step, row, stream, draw), count)


def diffusion_share(plan, alpha_0, num_steps, model_alpha_0):
    """Return the expected share of tokens that diffusion decides, in [0, 1].

    Args:
        plan: one of ``METHODS``.
        alpha_0: share that is asked for; None: that of the model, and 1 for ``strided``.
        num_steps: diffusion steps that are asked for; None: none are.
        model_alpha_0: share that the model was trained for.

    Raises:
        ValueError: if the plan is unknown or cannot do what is asked for.
    """
    if plan not in METHODS:
        raise ValueError(f"plan={plan!r} is not one of {', '.join(METHODS)}")
    if plan == "strided":
        share = 1.0 if alpha_0 is None else alpha_0
        if share != 1:
            raise ValueError(
                f"plan='strided' decides every token by diffusion: alpha_0={share} must be 1"
            )
        return share
    share = model_alpha_0 if alpha_0 is None else alpha_0
    if not 0 <= share <= 1:
        raise ValueError(f"alpha_0={share} must be in [0, 1]")
    if plan == "left-to-right" and (alpha_0 or num_steps):
        raise ValueError(
            f"plan='left-to-right' decides one token at a time: alpha_0={alpha_0} and "
            f"num_steps={num_steps} do not apply; leave them out or take another plan"
        )
    if num_steps and share == 0:
        raise ValueError(
            f"num_steps={num_steps} does not apply: with alpha_0=0 every token is decided alone; leave it "
            "out or raise alpha_0"
        )
    return share


def diffusion_counts(left, *, method, alpha_0, num_steps, seed):
    """Return how many positions each diffusion step decides; steps that decide none are left out.

    The positions that are left are decided afterwards, one at a time, from left to right.

    Args:
        left: number of open positions.
        method: ``binomial`` (arXiv 2506.01928, section 4; :func:`binomial_counts`); ``fixed``:
            round(alpha_0 left) positions in steps as equal as can be; ``strided``: step r decides the open
            positions r, r + T, r + 2 T, ...; ``left-to-right``: none.
        alpha_0: expected share of positions decided by diffusion, in [0, 1].
        num_steps: T; None: as many as open positions.
        seed: of the binomial counts.
    """
    steps = num_steps or max(left, 1)
    if not alpha_0:
        return []
    if method == "binomial":
        return binomial_counts(left, alpha_0, steps, seed)
    if method == "fixed":
        return even_counts(round(alpha_0 * left), steps)
    if method == "strided":
        return [len(range(step, left, steps)) for step in range(min(steps, left))]
    return []


def binomial_counts(left, alpha_0, num_steps, seed, draw=0):
    """Return a draw of Binomial(left, (alpha_s - alpha_t) / (1 - alpha_t)) for each t = 1, 1 - 1/T, ...

    Here alpha_t = alpha_0 (1 - t), s = t - 1/T, and ``left`` is what the draws before have left. Draws of
    zero are left out (arXiv 2506.01928, section 4).

    Args:
        left: number of open positions.
        alpha_0: expected share of positions decided by diffusion, in [0, 1].
        num_steps: T.
        seed: of the draws.
        draw: number of the repetition, each with other random numbers.
    """
    generator, most = _generator(seed, 0, 0, PLAN, draw), max(left, 1)
    counts = []
    for step in range(num_steps):
        t = 1 - step / num_steps
        keep_now, keep_next = alpha_0 * (1 - t), alpha_0 * (1 - t + 1 / num_steps)
        share = (keep_next - keep_now) / (1 - keep_now)
        # Drawn step by step, since all at once would need 8 bytes x T x ``left``.
        count = int((_numbers(generator, most)[:left] < share).sum())
        left -= count
        if count:
            counts.append(count)
    return counts


def even_counts(number, num_steps):
    """Return the sizes of ``num_steps`` parts of ``number``, as equal as can be, without zeros."""
    edges = [number * step // num_steps for step in range(num_steps + 1)]
    return [b - a for a, b in pairwise(edges) if b > a]


def row_order(is_open, *, method, num_diffusion, num_steps, seed, row):
    """Return one row's open positions in the order they are decided.

    Args:
        is_open: L booleans, without padding.
        method: see :func:`diffusion_counts`; only ``strided`` matters here, which is not random.
        num_diffusion: number of positions decided by diffusion, the sum of the counts.
        num_steps: stride of ``strided``; None: as many as open positions.
        seed: of the order.
        row: number of the row.
    """
    places = [place for place, value in enumerate(is_open) if value]
    if method == "strided":
        stride = num_steps or max(len(places), 1)
        return [place for first in range(stride) for place in places[first::stride]]
    if not num_diffusion:
        return places
    # Numbers belong to open positions, counted from the left: padding before them changes nothing.
    key = dict(zip(places, uniform(seed, 0, row, ORDER, len(places)).tolist(), strict=True))
    early = sorted(places, key=key.__getitem__)[:num_diffusion]
    chosen = set(early)
    return early + [place for place in places if place not in chosen]


def pad_lists(context, continuation, device):
    """Return three [B, L]: tokens, True at continuations, True where there is no padding.

    Args:
        context: B sequences of ids.
        continuation: B sequences of ids, which follow the contexts. Padding comes last.
        device: of the results.

    Raises:
        ValueError: if the numbers of rows differ.
    """
    context, continuation = (
        [[int(i) for i in row] for row in rows] for rows in (context, continuation)
    )
    if len(context) != len(continuation):
        raise ValueError(f"{len(context)} contexts for {len(continuation)} continuations")
    length = max(len(a) + len(b) for a, b in zip(context, continuation, strict=True))
    tokens = torch.zeros(len(context), length, dtype=torch.int64)
    predicted, valid = torch.zeros_like(tokens).bool(), torch.zeros_like(tokens).bool()
    for row, (first, then) in enumerate(zip(context, continuation, strict=True)):
        tokens[row, : len(first) + len(then)] = torch.tensor(first + then, dtype=torch.int64)
        predicted[row, len(first) : len(first) + len(then)] = True
        valid[row, : len(first) + len(then)] = True
    return tokens.to(device), predicted.to(device), valid.to(device)


def likelihood_orders(predicted, valid, order, alpha_0, seed, row_numbers):
    """Return a list of [B, L] prediction orders, a tensor each, and their name.

    An order names context first, then continuation, then padding.

    Args:
        predicted: [B, L] True at continuations.
        valid: [B, L] False for padding.
        order: ``left-to-right``; a number of random orders of the alpha_0 family; or for each row a
            permutation of its continuation, counted from 0. What is longer is cut.
        alpha_0: of the random orders, in [0, 1].
        seed: of the random orders.
        row_numbers: B numbers of the rows, which choose their random orders.

    Raises:
        ValueError: if ``order`` is none of these.
    """
    if (isinstance(order, str) and order != "left-to-right") or order is None:
        raise ValueError(f"order={order!r}: give 'left-to-right', a number of orders, or a tensor")
    if isinstance(order, bool) or (isinstance(order, int) and order < 1):
        raise ValueError(f"order={order}: the number of random orders must be at least 1")
    num_draws = order if isinstance(order, int) else 1
    drawn = []
    for draw in range(num_draws):
        rows = []
        for row in range(len(predicted)):
            places = predicted[row].nonzero()[:, 0].tolist()
            if isinstance(order, int):
                key = uniform(seed, 0, row_numbers[row], EVAL_ORDER, 2 * len(places), draw)
                early = [i for i in range(len(places)) if key[i] < alpha_0]
                early.sort(key=lambda i: key[len(places) + i])
                is_early = set(early)
                local = early + [i for i in range(len(places)) if i not in is_early]
            elif isinstance(order, str):
                local = list(range(len(places)))
            else:
                local = [int(i) for i in order[row]][: len(places)]
                if sorted(local) != list(range(len(places))):
                    raise ValueError(
                        f"order of row {row} is not a permutation of {len(places)} tokens"
                    )
            given = (valid[row] & ~predicted[row]).nonzero()[:, 0].tolist()
            padding = (~valid[row]).nonzero()[:, 0].tolist()
            rows.append(given + [places[i] for i in local] + padding)
        drawn.append(torch.tensor(rows, device=predicted.device))
    if isinstance(order, int):
        return drawn, f"{order} random order(s) of the family alpha_0={alpha_0:g}, seed {seed}"
    return drawn, order if isinstance(order, str) else "given by the caller"


def sort_order(is_masked, valid, key=None, is_shuffled=None, is_prompt=None):
    """Return [B, L] orders: prompts, other clean entries, masked ones, padding.

    Args:
        is_masked: [B, L] True for masked entries.
        valid: [B, L] False for padding.
        key: [B, L] in [0, 1), float64, which sorts the entries of a kind; None: reading order.
        is_shuffled: [B] True for rows whose masked entries are sorted by ``key``; in the others they
            keep reading order. None: in all rows.
        is_prompt: [B, L] True for clean entries that come first, in reading order; None: there are none.
    """
    length = is_masked.shape[1]
    reading = torch.arange(length, dtype=torch.float64, device=is_masked.device) / length
    reading = reading.expand(is_masked.shape)
    if key is None:
        key = reading
    elif is_shuffled is not None:
        key = torch.where(is_masked & ~is_shuffled[:, None], reading, key)
    if is_prompt is not None:
        key = torch.where(is_prompt, reading - 1, key)
    return (key + is_masked.double() + 2 * (~valid).double()).argsort(dim=1, stable=True)


def choose(logits, u, *, temperature, top_p):
    """Return [N] tokens: the inverse of each row's cumulative distribution at ``u``, in float64.

    This needs one random number for a token. Gumbel noise would need V, and in float32 it would lower the
    effective temperature of large vocabularies.

    Args:
        logits: [N, V] scores; -inf for what is no token.
        u: [N], uniform in [0, 1).
        temperature: divides the logits; 0 takes the most likely token.
        top_p: only the likeliest tokens that hold this share of probability are kept (nucleus); 1: all.
    """
    if temperature == 0:
        return logits.argmax(dim=1)
    scores = logits.double()
    if temperature != 1:  # the largest becomes 0, as a temperature near 0 would send it to infinity
        scores = (scores - scores.amax(dim=1, keepdim=True)) / temperature
    weights, tokens = torch.softmax(scores, dim=1), None
    if top_p < 1:
        weights, tokens = weights.sort(dim=1, descending=True)
        weights = weights.masked_fill(weights.cumsum(dim=1) - weights >= top_p, 0.0)
    cumulative = weights.cumsum(dim=1)
    total = cumulative[:, -1:]
    # The product may round up to the total, behind which only tokens of weight zero stand.
    below = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(u.to(weights.device)[:, None] * total, below)
    # right=True passes over tokens of weight zero: their cumulative sum equals the one before.
    picked = torch.searchsorted(cumulative, target, right=True)
    return (picked if tokens is None else tokens.gather(1, picked))[:, 0]


def _generator(seed, step, row, stream, draw):
    # The generator counts in the lowest word, so two draws are 2**64 blocks of numbers apart.
    return Philox(key=[seed, stream], counter=[0, draw, row, step])


def _numbers(generator, count):
    raw = np.asarray(generator.random_raw(count), dtype=np.uint64)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
