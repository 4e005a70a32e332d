"""From logits to tokens: temperature, nucleus, and one uniform number per token.

Sampling inverts the cumulative distribution in float64 at a number that is a function of (seed, row,
position). Gumbel noise in float32 would lower the effective temperature of large vocabularies, and
needs V random numbers per token. Letters: N = entries, V = vocabulary.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def choose_tokens(
    logits: Float[Tensor, "N V"],
    u: Float[Tensor, " N"],
    *,
    temperature: float,
    top_p: float,
) -> Int[Tensor, " N"]:
    """Return one token per entry.

    Args:
        logits: scores of the real tokens.
        u: uniform in [0, 1).
        temperature: divides the logits; 0 takes the most likely token.
        top_p: nucleus; 1 keeps every token.
    """
    if temperature == 0:
        return logits.argmax(dim=1)
    probs = torch.softmax(logits.double() / temperature, dim=1)
    if top_p >= 1:
        return _invert(probs, u)
    ranked, tokens = probs.sort(dim=1, descending=True)
    before = ranked.cumsum(dim=1) - ranked
    ranked = ranked.masked_fill(before >= top_p, 0.0)
    picked = _invert(ranked, u)
    return tokens.gather(1, picked[:, None])[:, 0]


def _invert(weights: Float[Tensor, "N V"], u: Float[Tensor, " N"]) -> Int[Tensor, " N"]:
    """Return the index where the normalised cumulative sum passes u."""
    cumulative = weights.cumsum(dim=1)
    target = (u.to(weights.device) * cumulative[:, -1])[:, None]
    # right=True skips entries of weight zero, whose cumulative sum equals the one before.
    index = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return index.clamp(max=weights.shape[1] - 1)
