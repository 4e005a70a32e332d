"""RMSNorm and LayerNorm, forwards and backwards, computed in fp32."""

from typing import Any

import torch

from transformer_engine_torch.enums import TORCH, DType
from transformer_engine_torch.rounding import quantize


def rmsnorm_fwd(
    x: Any, weight: Any, eps: float, out: Any, quantizer: Any, kind: Any, margin: int, centred: bool
) -> tuple[Any, None, torch.Tensor]:
    wide = x.detach().float()
    scale = (wide.square().mean(-1) + eps).rsqrt()
    return _finish(wide * scale[:, None] * _gamma(weight, centred), quantizer, kind), None, scale


def rmsnorm_bwd(
    grad: Any, x: Any, scale: torch.Tensor, weight: Any, margin: int, centred: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    unit = x.detach().float() * scale[:, None]
    inner = grad.float() * _gamma(weight, centred)
    dx = (inner - unit * (inner * unit).mean(-1, keepdim=True)) * scale[:, None]
    return dx.to(x.dtype), (grad.float() * unit).sum(0).to(weight.dtype)


def layernorm_fwd(
    x: Any, weight: Any, bias: Any, eps: float, out: Any, quantizer: Any, kind: Any, margin: int,
    centred: bool,
) -> tuple[Any, torch.Tensor, torch.Tensor]:  # fmt: skip
    wide = x.detach().float()
    mean = wide.mean(-1)
    scale = (wide.var(-1, unbiased=False) + eps).rsqrt()
    unit = (wide - mean[:, None]) * scale[:, None]
    return (
        _finish(unit * _gamma(weight, centred) + bias.detach().float(), quantizer, kind),
        mean,
        scale,
    )


def layernorm_bwd(
    grad: Any,
    x: Any,
    mean: torch.Tensor,
    scale: torch.Tensor,
    weight: Any,
    margin: int,
    centred: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    unit = (x.detach().float() - mean[:, None]) * scale[:, None]
    inner = grad.float() * _gamma(weight, centred)
    mixed = inner.mean(-1, keepdim=True) + unit * (inner * unit).mean(-1, keepdim=True)
    dx, dtype = (inner - mixed) * scale[:, None], weight.dtype
    return dx.to(x.dtype), (grad.float() * unit).sum(0).to(dtype), grad.float().sum(0).to(dtype)


def _gamma(weight: torch.Tensor, centred: bool) -> torch.Tensor:
    return weight.detach().float() + (1.0 if centred else 0.0)


def _finish(out: torch.Tensor, quantizer: Any, kind: Any) -> Any:
    narrow = out.to(TORCH[DType(int(kind))])
    return narrow if quantizer is None else quantize(narrow, quantizer)
