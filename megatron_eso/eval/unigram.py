"""A unigram model of the training data: what a trained model must clearly beat."""

import torch
from torch import Tensor

from megatron_eso.eval.scores import Score, score


def unigram_score(
    train_tokens: Tensor,
    held_out: Tensor,
    is_valid: Tensor,
    *,
    vocab_size: int,
    bytes_per_token: float,
) -> Score:
    """Return the cross-entropy of held-out rows under token frequencies, each count plus one.

    Args:
        train_tokens: token ids, in any shape.
        held_out: [B, L] rows to score.
        is_valid: [B, L] False at padding, which is not scored.
        vocab_size: ids including the mask token, which gets no probability.
        bytes_per_token: UTF-8 bytes of text per token.
    """
    counts = torch.bincount(train_tokens.reshape(-1), minlength=vocab_size - 1).double() + 1
    log_probs = (counts / counts.sum()).log()
    nats = -(log_probs[held_out] * is_valid).sum(dim=1)
    tokens = is_valid.sum(dim=1).double()
    return score("unigram of the training data", nats, tokens, bytes_per_token)
