"""Norms that stand alone."""

import torch
from torch.nn.functional import layer_norm, rms_norm


def normalise(x, kind, weight, bias, eps):
    if kind == "RMSNorm":
        return rms_norm(x, weight.shape, weight, eps)
    return layer_norm(x, weight.shape, weight, bias, eps)


class _Norm(torch.nn.Module):
    kind = ""

    def __init__(self, normalized_shape=None, eps=1e-5, sequence_parallel=None, params_dtype=None,
                 zero_centered_gamma=False, hidden_size=None, device="cuda", **_):  # fmt: skip
        super().__init__()
        assert not zero_centered_gamma
        size, self.eps, self.bias = normalized_shape or hidden_size, eps, None
        self.weight = torch.nn.Parameter(torch.ones(size, dtype=params_dtype, device=device))
        if self.kind == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(size, dtype=params_dtype, device=device))
        for parameter in self.parameters():
            parameter.sequence_parallel = sequence_parallel

    def forward(self, x):
        return normalise(x, self.kind, self.weight, self.bias, self.eps)


class LayerNorm(_Norm):
    kind = "LayerNorm"


class RMSNorm(_Norm):
    kind = "RMSNorm"
