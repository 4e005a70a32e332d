"""What the optimizer runs over lists of tensors."""

from typing import Any

import torch


def multi_tensor_scale(size: int, found: torch.Tensor, lists: Any, scale: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source.float() * scale)
        if not bool(torch.isfinite(source).all()):
            found.fill_(1)


def multi_tensor_l2norm(
    size: int, found: torch.Tensor, lists: Any, per_tensor: Any = False
) -> tuple[torch.Tensor, torch.Tensor]:
    norms = torch.stack([t.float().norm() for t in lists[0]]) if lists[0] else torch.zeros(1)
    each = norms if per_tensor else torch.empty(0)
    return norms.norm().view(1), each


def multi_tensor_adam(
    size: int, found: torch.Tensor, lists: Any, lr: float, beta1: float, beta2: float, eps: float,
    step: int, mode: int, correct: int, decay: float,
) -> None:  # fmt: skip
    """AdamW (``mode`` 1), with moments corrected for their start at zero."""
    assert mode == 1 and correct == 1
    grads, params, firsts, seconds = lists[:4]
    for grad, param, first, second in zip(grads, params, firsts, seconds, strict=True):
        g = grad.float()
        first.mul_(beta1).add_(g, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        update = (first / (1 - beta1**step)) / ((second / (1 - beta2**step)).sqrt() + eps)
        param.sub_(lr * (update + decay * param))
    assert len(lists) == 4, "Megatron keeps the fp32 weights, not Transformer Engine"


def multi_tensor_compute_scale_and_scale_inv(
    size: int, found: torch.Tensor, lists: Any, most: float, power_of_two: bool, epsilon: float
) -> None:
    for amax, scale, inverse in zip(*lists, strict=True):
        new = torch.where(amax > 0, most / amax.clamp(min=epsilon), torch.ones_like(amax))
        scale.copy_(2.0 ** new.log2().floor() if power_of_two else new)
        inverse.copy_(1 / scale)
