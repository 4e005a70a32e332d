"""The order of a row's entries: clean first, then masked, then padding.

Everything here is a pure function of its arguments: randomness comes in as ``shuffle_key``.
Keys are float64, which never tie in practice (float32 keys do above about four million entries).
Shapes: B = rows, L = tokens in a row.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def prediction_order(
    is_masked: Bool[Tensor, "B L"],
    is_valid: Bool[Tensor, "B L"],
    shuffle_key: Float[Tensor, "B L"],
    *,
    masked_in_reading_order: bool,
) -> Int[Tensor, "B L"]:
    """Return the positions of each row in the order the model sees them.

    Args:
        is_masked: True where the token is to be predicted.
        is_valid: False for padding, which goes last so that causal attention never sees it.
        shuffle_key: uniform in [0, 1); decides the order within the clean and the masked group.
        masked_in_reading_order: keep the masked group left to right (the sequential phase) instead
            of shuffling it (the diffusion phase).

    Returns:
        A permutation of ``range(L)`` per row; ``x.gather(1, order)`` puts a row into that order.
    """
    if masked_in_reading_order:
        shuffle_key = torch.where(is_masked, reading_key(is_masked), shuffle_key)
    # Keys are below 1, so adding the group's number keeps the groups apart.
    group = is_masked.double() + 2 * (~is_valid).double()
    return (shuffle_key + group).argsort(dim=1)


def likelihood_order(
    is_diffusion: Bool[Tensor, "B L"],
    is_valid: Bool[Tensor, "B L"],
    shuffle_key: Float[Tensor, "B L"],
) -> Int[Tensor, "B L"]:
    """Return an order of the alpha_0 family for exact likelihood (eso-lm, section 5).

    The positions chosen for diffusion come first in random order, the rest in reading order.
    """
    return prediction_order(
        ~is_diffusion & is_valid, is_valid, shuffle_key, masked_in_reading_order=True
    )


def reading_key(like: Tensor) -> Float[Tensor, "B L"]:
    """Return sort keys in [0, 1) that keep reading order."""
    length = like.shape[1]
    return (torch.arange(length, dtype=torch.float64, device=like.device) / length).expand(
        like.shape
    )


def invert(order: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """Return the permutation that undoes ``order``."""
    return order.argsort(dim=1)
