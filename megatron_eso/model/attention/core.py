"""The core attention module of our layer specs: rotates, picks the kernel, returns [L, R, h d]."""

from typing import Any

import torch
from torch import Tensor

from megatron_eso.model.attention.context import heads_of_whole_rows, tokens_of_all_heads
from megatron_eso.model.attention.dense import dense_attention
from megatron_eso.model.attention.flex import flex_rows_attention
from megatron_eso.model.attention.rows import AttentionRows
from megatron_eso.model.attention.split import copies_attention, split_attention
from megatron_eso.model.attention.store import attend_to_store
from megatron_eso.model.rotary import rotate
from megatron_eso.model.te_specs import attend_causally, causal_attention
from megatron_eso.objective.rows import Pattern
from megatron_eso.parallel.megatron_patches import importing_megatron

with importing_megatron():
    from megatron.core.transformer.module import MegatronModule


class EsoCoreAttention(MegatronModule):
    """Called by Megatron's SelfAttention with queries, keys and values of this tensor rank."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any = None,
        attention_type: str = "self",
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        *,
        backend: str = "split",
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.backend = backend
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.context_group = pg_collection.cp if config.context_parallel_size > 1 else None
        if backend == "te":
            self.fused = causal_attention(
                config, layer_number, softmax_scale=self.scale, pg_collection=pg_collection
            )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: AttentionRows | None = None,
    ) -> Tensor:
        """Return [L, R, h d]; L is the part of the rows on this context rank.

        Args:
            query: [L, R, h, d], not rotated yet.
            key: [L, R, g, d].
            value: [L, R, g, d].
            attention_mask: unused; the rows say who sees whom.
            attn_mask_type: unused.
            attention_bias: unused.
            packed_seq_params: the rows.
        """
        rows = packed_seq_params
        if rows is None or rows.cos is None or rows.sin is None:
            raise ValueError("EsoCoreAttention needs AttentionRows in packed_seq_params")
        query, key = rotate(query, rows.cos, rows.sin), rotate(key, rows.cos, rows.sin)
        if self.context_group is None:
            return self.attend_rotated(query, key, value, rows)
        own = heads_of_whole_rows(query, key, value, self.context_group)
        return tokens_of_all_heads(self.attend_rotated(*own, rows), self.context_group)

    def attend_rotated(
        self, query: Tensor, key: Tensor, value: Tensor, rows: AttentionRows
    ) -> Tensor:
        """Return [L, R, h d] from rotated queries and keys; shapes as in :meth:`forward`."""
        if self.backend == "te" and rows.store is None:
            return self._attend_te(query, key, value, rows)
        q = query.permute(1, 2, 0, 3)
        if rows.store is not None:
            k, v = rows.store.extend(self.layer_number, key, value)
            mask = rows.segment_mask(q.shape[2], k.shape[2], q.dtype)
            out = attend_to_store(q, k, v, mask, self.scale)
        else:
            out = self._attend(q, key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3), rows)
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def _attend_te(self, query: Tensor, key: Tensor, value: Tensor, rows: AttentionRows) -> Tensor:
        """Return D and X rows from Transformer Engine, Z rows from the split merge; see forward."""
        if rows.pattern is not Pattern.CAUSAL:
            raise ValueError(f"precision.attention=te computes causal rows, not {rows.pattern}")
        first_z = query.shape[1] - rows.num_pairs
        # Its kernels take pointers, and it does not notice every gap between the rows of a slice.
        causal = (x[:, :first_z].contiguous() for x in (query, key, value))
        plain = attend_causally(self.fused, *causal)
        if not rows.num_pairs:
            return plain
        x_rows, z_rows = slice(first_z - rows.num_pairs, first_z), slice(first_z, None)
        parts = (
            query[:, z_rows],
            key[:, x_rows],
            value[:, x_rows],
            key[:, z_rows],
            value[:, z_rows],
        )
        copies = copies_attention(*(x.permute(1, 2, 0, 3) for x in parts), scale=self.scale)
        return torch.cat([plain, copies.permute(2, 0, 1, 3).flatten(2)], dim=1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, rows: AttentionRows) -> Tensor:
        if rows.pattern is Pattern.CAUSAL and self.backend == "split":
            return split_attention(q, k, v, num_pairs=rows.num_pairs, scale=self.scale)
        attend = flex_rows_attention if self.backend == "flex" else dense_attention
        return attend(
            q,
            k,
            v,
            num_pairs=rows.num_pairs,
            scale=self.scale,
            pattern=rows.pattern,
            block_size=rows.block_size,
            is_valid=rows.is_valid,
        )
