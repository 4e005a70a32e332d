"""The parts of a layer in Transformer Engine: norms fused into the projections that follow them.

Only :mod:`megatron_eso.model.specs` and the core attention use this, and only where
``precision.backend`` or ``precision.attention`` is ``te``: without Transformer Engine Megatron's
classes are stand-ins that raise when they are built.
"""

from copy import copy
from typing import Any

from megatron_eso.parallel.megatron_patches import importing_megatron

with importing_megatron():
    from megatron.core.extensions import transformer_engine as megatron_te
    from megatron.core.transformer.enums import AttnMaskType


def norm_and_projection() -> Any:
    """Return the class of a norm fused with the projection that follows it."""
    return megatron_te.TELayerNormColumnParallelLinear


def output_projection() -> Any:
    """Return the class of the projections whose output is added to the residual stream."""
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
