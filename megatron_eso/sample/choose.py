"""From logits to tokens: the pure function of the exported model, with its shapes checked."""

from jaxtyping import Float, Int
from torch import Tensor

from megatron_eso.export.hf.decoding_esolm import choose


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
    return choose(logits, u, temperature=temperature, top_p=top_p)
