"""User buffers: memory of one shape that tensor ranks exchange while a product is computed.

Here the exchange comes before or after the product. A buffer counts its uses, and takes no other shape.
"""

from typing import Any

import torch
import torch.distributed as dist

from transformer_engine_torch.enums import CommOverlapType


class CommOverlapHelper:
    """The ranks that share buffers: all of them, or the smaller group."""

    def __init__(self, world: Any = None, tensor_group: Any = None) -> None:
        self.group = tensor_group if tensor_group is not None else world


class CommOverlap:
    """A buffer [tokens of all ranks, hidden size]."""

    def __init__(
        self, shape: list[int], dtype: torch.dtype, helper: CommOverlapHelper, tp_size: int,
        *_: Any, **__: Any,
    ) -> None:  # fmt: skip
        if shape[0] % tp_size:
            raise RuntimeError(f"{shape[0]} tokens cannot be dealt to {tp_size} ranks")
        assert helper.group.size() == tp_size
        self.shape, self.group, self.size = list(shape), helper.group, tp_size
        self.data, self.uses = torch.empty(shape, dtype=dtype), 0

    def is_fp8_ubuf(self) -> bool:
        return self.data.element_size() == 1

    def with_cublasmp(self) -> bool:
        return False

    def _own(self) -> torch.Tensor:
        return self.data.chunk(self.size)[self.group.rank()]

    def copy_into_buffer(self, tensor: torch.Tensor, local_chunk: bool = False) -> None:
        place = self._own() if local_chunk else self.data
        assert tensor.numel() == place.numel(), f"{tuple(tensor.shape)} into {tuple(place.shape)}"
        assert tensor.element_size() == place.element_size()
        place.copy_(tensor.reshape(place.shape))

    def get_buffer(self, local_chunk: bool = False, shape: Any = None) -> torch.Tensor:
        place = self._own() if local_chunk else self.data
        if shape is None:
            return place
        assert torch.Size(shape).numel() == place.numel(), f"{shape} of {tuple(place.shape)}"
        return place.view(shape)

    def get_communication_stream(self) -> tuple[None, None]:
        return None, None

    def gather(self) -> None:
        self.uses += 1
        parts = [torch.empty_like(self._own()) for _ in range(self.size)]
        dist.all_gather(parts, self._own().contiguous(), group=self.group)
        self.data.copy_(torch.cat(parts))

    def scatter(self, whole: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of the sum over ranks."""
        self.uses += 1
        assert whole.numel() == self.data.numel(), f"{tuple(whole.shape)} of {self.shape}"
        summed = whole.reshape(self.shape).clone()
        dist.all_reduce(summed, group=self.group)
        return summed.chunk(self.size)[self.group.rank()]


class CommOverlapP2P(CommOverlap):
    """The same, exchanged around a ring."""


def before_product(buffer: Any, kind: Any) -> None:
    """Gather what a product reads, or, in bulk, what a later one reads."""
    if buffer is not None and kind == CommOverlapType.AG:
        buffer.gather()


def after_product(buffer: Any, kind: Any, out: torch.Tensor, extra: Any, is_bulk: bool) -> None:
    """Sum and deal a product's output; in bulk, what lies in the buffer."""
    if buffer is None or kind != CommOverlapType.RS:
        return
    own = buffer.scatter(buffer.data if is_bulk else out)
    if is_bulk and not buffer.is_fp8_ubuf():
        buffer.get_buffer(local_chunk=True).copy_(own)
    else:
        extra.copy_(own.view(extra.shape))


def bulk_overlap_ag_with_external_gemm(buffer: Any, *_: Any) -> None:
    buffer.gather()


def device_supports_multicast() -> bool:
    return True


def ubuf_built_with_mpi() -> bool:
    return False


def get_stream_priority_range() -> tuple[int, int]:
    return 0, -5
