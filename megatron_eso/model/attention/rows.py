"""What the attention of a micro-batch must know about its rows.

It travels through Megatron's transformer block in place of ``packed_seq_params``, which the block hands
to the core attention untouched (also when it recomputes activations).
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatron_eso.model.attention.store import segment_mask
from megatron_eso.objective.rows import Pattern
from megatron_eso.parallel.megatron_patches import importing_megatron

with importing_megatron():
    from megatron.core.packed_seq_params import PackedSeqParams


class KeyValueStore(Protocol):
    """Keeps keys and values between the steps of a sampler."""

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return all keys and values [R, g, T, d] a new segment may see: the kept ones, then its own.

        Args:
            layer: number of the layer on this stage, from 1.
            key: [n, R, g, d] rotated keys of the new segment.
            value: [n, R, g, d].
        """
        ...


class Graphs(Protocol):
    """Runs layers from CUDA graphs; see model/layer_graphs.py."""

    def replay(self, layer: nn.Module, hidden: Tensor, rows: "AttentionRows") -> Tensor:
        """Return a layer's output for hidden states [L, R, H]."""
        ...


@dataclass
class AttentionRows(PackedSeqParams):
    """Rows [D...; X...; Z...] of a micro-batch, or the new segment of a cached sampler."""

    qkv_format: str = "sbhd"
    cos: Tensor | None = None
    """[L, R, 1, d/2] cosines of the rotary angles."""
    sin: Tensor | None = None
    """[L, R, 1, d/2]."""
    num_pairs: int = 0
    """X rows, and Z rows after them; the rows before are D rows."""
    pattern: Pattern = Pattern.CAUSAL
    block_size: int = 0
    is_valid: Tensor | None = None
    """[R, L] of BIDIRECTIONAL and BLOCK rows with padding; [R, T] of a store's keys with padding."""
    store: KeyValueStore | None = None
    """Set while sampling: queries see the store and are causal among themselves."""
    mask: Tensor | None = None
    """Result of :meth:`segment_mask`: unless given, the first layer makes it for all."""
    graphs: Graphs | None = None
    """Set in training passes with ``parallel.cuda_graphs``."""
    graph_use: Any = None
    """This micro-batch's use of graphs, set at the first layer."""

    def segment_mask(self, new: int, total: int, dtype: torch.dtype) -> Tensor | None:
        """Return what is added to the scores of a segment's n queries, or None if all see all.

        Args:
            new: entries n of the segment.
            total: keys T, the segment's own last.
            dtype: of the scores.

        Returns:
            See :func:`megatron_eso.model.attention.store.segment_mask`.
        """
        is_causal = self.pattern is Pattern.CAUSAL and new > 1
        if self.mask is None and (is_causal or self.is_valid is not None):
            assert self.cos is not None
            own = torch.arange(total - new, total, device=self.cos.device)
            self.mask = segment_mask(own, total, dtype, is_causal=is_causal, is_valid=self.is_valid)
        return self.mask
