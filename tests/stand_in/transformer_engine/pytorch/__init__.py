from transformer_engine.pytorch import attention, distributed, fp8, ops, router, tensor
from transformer_engine.pytorch.attention import DotProductAttention
from transformer_engine.pytorch.fp8 import fp8_autocast, fp8_model_init
from transformer_engine.pytorch.linear import GroupedLinear, LayerNormLinear, Linear
from transformer_engine.pytorch.norms import LayerNorm, RMSNorm

__all__ = [
    "DotProductAttention", "GroupedLinear", "LayerNorm", "LayerNormLinear", "Linear", "RMSNorm",
    "attention", "distributed", "fp8", "fp8_autocast", "fp8_model_init", "ops", "router", "tensor",
]  # fmt: skip
