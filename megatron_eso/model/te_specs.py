"""The parts of a layer in Transformer Engine: norms fused into the projections that follow them.

Only :mod:`megatron_eso.model.specs` and the core attention use this, and only where
``precision.backend`` or ``precision.attention`` is ``te``: without Transformer Engine Megatron's
classes are stand-ins that raise when they are built.
"""

from copy import copy
from functools import cache
from typing import Any

from megatron_eso.parallel.megatron_patches import importing_megatron

with importing_megatron():
    from megatron.core.extensions import transformer_engine as megatron_te
    from megatron.core.transformer.enums import AttnMaskType


def attention_input() -> Any:
    """Return the class of a norm fused with the q, k, v projection, biased by ``attention_bias``."""
    linear: Any = megatron_te.TELayerNormColumnParallelLinear
    return _with_own_bias(linear)


def attention_projection() -> Any:
    """Return the class of attention's output projection, biased by ``attention_bias``."""
    linear: Any = megatron_te.TERowParallelLinear
    return _with_own_bias(linear)


def mlp_input() -> Any:
    """Return the class of a norm fused with the first MLP matrix."""
    return megatron_te.TELayerNormColumnParallelLinear


def mlp_output() -> Any:
    """Return the class of the second MLP matrix."""
    return megatron_te.TERowParallelLinear


def norm() -> Any:
    """Return the class of norms that stand alone: before the head, and of queries and keys."""
    return megatron_te.TENorm


def causal_attention(config: Any, layer_number: int, **where: Any) -> Any:
    """Return Transformer Engine's attention for causal rows: [L, R, h, d] three times -> [L, R, h d].

    Context ranks divide the heads around it (attention/context.py), so it is built for its share of them
    and need not know of context parallelism.

    Args:
        config: Megatron's configuration.
        layer_number: number of the layer, from 1.
        where: process groups and scale.
    """
    share, tensor = copy(config), config.tensor_model_parallel_size
    # Only then does Transformer Engine leave random states alone; a CUDA graph cannot hold them.
    share.sequence_parallel = True
    share.context_parallel_size = 1
    share.num_attention_heads //= config.context_parallel_size
    groups = config.num_query_groups // tensor // config.context_parallel_size
    share.num_query_groups = tensor * max(groups, 1)
    attention: Any = megatron_te.TEDotProductAttention
    return attention(share, layer_number, AttnMaskType.causal, "self", **where)


def attend_causally(attention: Any, query: Any, key: Any, value: Any) -> Any:
    """Return the output of :func:`causal_attention`'s module for rotated queries and keys."""
    return attention(query, key, value, None, AttnMaskType.causal)


@cache
def _with_own_bias(linear: Any) -> Any:
    """Return a subclass that takes ``attention_bias`` instead of Megatron's one switch; see specs.py."""

    class Linear(linear):
        def __init__(self, *args: Any, attention_bias: bool = False, **kwargs: Any) -> None:
            kwargs["bias"] = attention_bias
            super().__init__(*args, **kwargs)

    return Linear
