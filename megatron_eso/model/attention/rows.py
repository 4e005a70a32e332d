"""What the attention of a micro-batch must know about its rows.

Travels through Megatron's transformer block in the place of its ``packed_seq_params``, which the block
hands to the core attention untouched (also when it recomputes activations).
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_eso.objective.rows import Pattern
from megatron_eso.parallel.megatron_patches import quiet_megatron_import

with quiet_megatron_import():
    from megatron.core.packed_seq_params import PackedSeqParams


class KeyValueStore(Protocol):
    """Keeps keys and values between the steps of a sampler."""

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return all keys and values a new segment may see: the kept ones, then its own.

        Args:
            layer: number of the layer on this stage, from 1.
            key: [n, R, h, d] rotated keys of the new segment.
            value: [n, R, h, d].
        """
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
    """[R, L] of BIDIRECTIONAL rows with padding."""
    store: KeyValueStore | None = None
    """Set while sampling: queries see the store and are causal among themselves."""
