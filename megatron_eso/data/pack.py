"""Pack documents into rows of L + 1 tokens at a stride of L, so that every token is in the first L once.

Packed: documents follow each other, each with its end token; only the last row of a partition is
padded. Separate: every document starts a new row. Padding is stored as the mask id.
"""

from collections.abc import Iterator

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray


class RowPacker:
    """Collects tokens of documents and gives back whole rows."""

    def __init__(
        self, *, sequence_length: int, mask_id: int, end_of_document_id: int, separate: bool
    ) -> None:
        self.num_tokens = 0
        self._length = sequence_length
        self._mask_id = mask_id
        self._end = np.array([end_of_document_id], np.uint32)
        self._separate = separate
        self._parts: list[NDArray[np.uint32]] = []
        self._held = 0

    def add(self, tokens: NDArray[np.uint32]) -> Iterator[NDArray[np.uint32]]:
        """Take more tokens of the current document; yield the rows [n, L + 1] that are now full."""
        self._parts.append(tokens)
        self._held += len(tokens)
        self.num_tokens += len(tokens)
        if self._held > self._length:
            held = np.concatenate(self._parts)
            num_rows = (len(held) - 1) // self._length
            yield sliding_window_view(held, self._length + 1)[:: self._length]
            self._parts = [held[num_rows * self._length :].copy()]
            self._held = len(self._parts[0])

    def end_document(self) -> Iterator[NDArray[np.uint32]]:
        """Add the end token; yield full rows and, if rows are separate, the document's padded last row."""
        yield from self.add(self._end)
        if self._separate:
            yield from self.finish()

    def finish(self) -> Iterator[NDArray[np.uint32]]:
        """Yield the remaining tokens as one padded row [1, L + 1], and start over."""
        if self._held:
            row = np.full(self._length + 1, self._mask_id, np.uint32)
            row[: self._held] = np.concatenate(self._parts)
            yield row[None]
        self._parts, self._held = [], 0
