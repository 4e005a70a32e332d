"""Attention of causal rows [L, R, h, d]."""

import os

from torch.nn.functional import scaled_dot_product_attention

from transformer_engine.pytorch.fp8 import FP8GlobalStateManager, Stateful
from transformer_engine.pytorch.graph import is_graph_capturing

_dpa_fp8_recipe = os.environ.get("NVTE_DPA_FP8_RECIPE", "")


class DotProductAttention(Stateful):
    def __init__(self, num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.0,
                 qkv_format="sbhd", attn_mask_type="causal", sequence_parallel=False, tp_size=1,
                 get_rng_state_tracker=None, tp_group=None, layer_number=None,
                 attention_type="self", softmax_scale=None, **_):  # fmt: skip
        super().__init__()
        assert attention_dropout == 0.0
        self.heads = num_attention_heads // tp_size
        self.groups = (num_gqa_groups or num_attention_heads) // tp_size
        self.scale = softmax_scale
        # The real one forks random states around its kernel, but for sequence parallelism.
        self.rng_states_tracker = None if sequence_parallel else get_rng_state_tracker

    def forward(self, query, key, value, attention_mask=None, *, attn_mask_type, qkv_format="sbhd",
                **_):  # fmt: skip
        assert (attention_mask, attn_mask_type, qkv_format) == (None, "causal", "sbhd")
        if self.rng_states_tracker is not None and is_graph_capturing():
            raise AssertionError("Unsupported RNG states tracker.")
        assert (query.shape[2], key.shape[2]) == (self.heads, self.groups)
        recipe = FP8GlobalStateManager.recipe
        if recipe is not None and recipe.fp8_dpa:
            query = self.rounded(query, 1)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=self.heads != self.groups
        )
        return out.permute(2, 0, 1, 3).flatten(2)
