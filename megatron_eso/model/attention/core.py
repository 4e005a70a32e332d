"""The core attention module of our layer specs: rotates, picks the kernel, returns [L, R, h d]."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_eso.model.attention.dense import dense_attention
from megatron_eso.model.attention.flex import flex_rows_attention
from megatron_eso.model.attention.rows import AttentionRows
from megatron_eso.model.attention.split import split_attention
from megatron_eso.model.rotary import rotate
from megatron_eso.objective.rows import Pattern
from megatron_eso.parallel.megatron_patches import quiet_megatron_import

with quiet_megatron_import():
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
        """Return [L, R, h d].

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
        if rows.store is not None:
            key, value = rows.store.extend(self.layer_number, key, value)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = self._attend(q, k, v, rows)
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, rows: AttentionRows) -> Tensor:
        if rows.store is not None:
            is_causal = rows.pattern is Pattern.CAUSAL
            return segment_attention(
                q, k, v, self.scale, is_causal=is_causal, is_valid=rows.is_valid
            )
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


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    is_causal: bool = True,
    is_valid: Tensor | None = None,
) -> Tensor:
    """Return attention of a new segment that sees all kept keys and, inside itself, those before.

    Args:
        q: [R, h, n, d].
        k: [R, g, T, d] with T >= n; the last n keys are the segment's own.
        v: [R, g, T, d].
        scale: factor of the scores.
        is_causal: False: the segment's entries see each other both ways (block diffusion).
        is_valid: [R, T], False for keys that are padding; every query still sees itself.
    """
    new, total = q.shape[2], k.shape[2]
    mask = None
    if is_causal and new > 1:
        mask = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
    if is_valid is not None:
        own = torch.eye(new, total, dtype=torch.bool, device=q.device).roll(total - new, dims=1)
        seen = is_valid[:, None, None, :] if mask is None else mask & is_valid[:, None, None, :]
        mask = seen | own
    gqa = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa)
