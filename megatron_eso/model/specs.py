"""Layer specs: Megatron's parallel layers, or Transformer Engine's, around our core attention."""

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from megatron_eso.config.schema import ModelConfig
from megatron_eso.model import te_specs
from megatron_eso.model.attention.core import EsoCoreAttention
from megatron_eso.model.layer_graphs import GraphedLayer
from megatron_eso.parallel.megatron_patches import importing_megatron
from megatron_eso.parallel.norms import LayerNorm, RMSNorm

with importing_megatron():
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

# A plain layer's norm weights are saved under the names that Transformer Engine's fused layers use, so
# that checkpoints can move between the two.
_FUSED_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


@cache
def with_own_bias(linear: Any) -> Any:
    """Return a subclass for attention's projections, which is biased only if ``attention_bias`` says so.

    Megatron has one switch for the biases of these and of the MLP; the official Eso-LM shape has biases in
    the MLP alone.
    """

    class Linear(linear):
        def __init__(self, *args: Any, attention_bias: bool = False, **kwargs: Any) -> None:
            kwargs["bias"] = attention_bias
            super().__init__(*args, **kwargs)

    return Linear


@dataclass(frozen=True)
class _Parts:
    """The classes that a layer is made of."""

    norm_before: Any
    """Before attention and before the MLP; the identity where the next projection includes the norm."""
    into: Any
    """The query, key and value projection, and the first MLP matrix."""
    out_of: Any
    """The output projection, and the second MLP matrix."""
    norm: Any
    """Before the head, and of queries and keys."""


def _torch_parts(model: ModelConfig) -> _Parts:
    norm: Any = RMSNorm if model.norm == "rmsnorm" else LayerNorm
    return _Parts(norm, into=ColumnParallelLinear, out_of=RowParallelLinear, norm=norm)


def _te_parts() -> _Parts:
    into, out_of = te_specs.norm_and_projection(), te_specs.output_projection()
    return _Parts(IdentityOp, into=into, out_of=out_of, norm=te_specs.norm())


def block_spec(
    model: ModelConfig, *, num_layers: int, attention: str, backend: str = "torch"
) -> TransformerBlockSubmodules:
    """Return the spec of the layers of one pipeline stage.

    Args:
        model: shape; chooses norms, biases and query/key norms.
        num_layers: layers of this stage.
        attention: kernel, ``split``, ``dense``, ``flex`` or ``te``.
        backend: ``torch``, or ``te`` for Transformer Engine's layers; the parameters are the same.
    """
    # Megatron's annotations are narrower than what its spec builder accepts.
    add_residual: Any = get_bias_dropout_add
    parts = _te_parts() if backend == "te" else _torch_parts(model)
    head_norm = parts.norm if model.qk_norm else IdentityOp
    bias = {"attention_bias": model.attention_bias}
    layer = ModuleSpec(
        module=GraphedLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=parts.norm_before,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ModuleSpec(module=with_own_bias(parts.into), params=bias),
                    core_attention=partial(EsoCoreAttention, backend=attention),  # type: ignore[arg-type]
                    linear_proj=ModuleSpec(module=with_own_bias(parts.out_of), params=bias),
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=add_residual,
            pre_mlp_layernorm=parts.norm_before,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=parts.into, linear_fc2=parts.out_of),
            ),
            mlp_bda=add_residual,
            sharded_state_dict_keys_map={} if backend == "te" else _FUSED_NAMES,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=parts.norm)
