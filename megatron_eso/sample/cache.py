"""Keys and values of the tokens decided so far: preallocated; only those of clean tokens are kept.

A step feeds [tokens decided before; masks of this step]. The keys of both are written after the kept
ones; the next step overwrites those of the masks. Keys are stored rotated, with their true positions.
"""

import torch
from torch import Tensor

_GRAIN = 256  # entries: windows and chunks of keys are whole multiples of it


class Cache:
    """Per layer [R, g, T, d] buffers, each head's keys side by side as attention reads them.

    Implements ``model.attention.rows.KeyValueStore``.
    """

    def __init__(self, capacity: int) -> None:
        """Make an empty cache.

        Args:
            capacity: T, the most entries a step may see: all tokens of a row and one step's masks. It is
                rounded up, as kernels with a mask require.
        """
        self.capacity = -(-capacity // _GRAIN) * _GRAIN
        self.num_kept = 0
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the kept keys and values followed by a new segment's; see KeyValueStore."""
        end = self.num_kept + key.shape[0]
        keys, values = self.buffers(layer, key, value)
        keys[:, :, self.num_kept : end] = key.permute(1, 2, 0, 3)
        values[:, :, self.num_kept : end] = value.permute(1, 2, 0, 3)
        return keys[:, :, :end], values[:, :, :end]

    def buffers(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return a layer's whole buffers [R, g, T, d]; the first call makes them like the segment's.

        They begin as zeros: steps that run from graphs read, with weight 0, what is not written yet.
        """
        if layer not in self._keys:
            shape = (*key.shape[1:3], self.capacity, key.shape[3])
            self._keys[layer] = torch.zeros(shape, dtype=key.dtype, device=key.device)
            self._values[layer] = torch.zeros(shape, dtype=value.dtype, device=value.device)
        return self._keys[layer], self._values[layer]

    def keep(self, number: int) -> None:
        """Keep the first ``number`` entries of the last segment: its clean tokens."""
        self.num_kept += number
