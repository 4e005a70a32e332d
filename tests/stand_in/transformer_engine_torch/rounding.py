"""Rounding to FP8 with one scale a tensor, delayed or of the tensor itself.

A quantizer of Transformer Engine's Python half says the format and the scale, whether the tensor is
wanted as it is (``rowwise``) or transposed (``columnwise``), and which class holds the result.
"""

from typing import Any

import torch
import torch.distributed as dist

from transformer_engine_torch.enums import TORCH, DType

LARGEST = {kind: torch.finfo(TORCH[kind]).max for kind in (DType.kFloat8E4M3, DType.kFloat8E5M2)}


def quantize(tensor: Any, quantizer: Any, output: Any = None, noop: Any = None) -> Any:
    """Round a tensor into a new one, or into ``output`` unless ``noop`` is set."""
    if output is None:
        output = new_output(tuple(tensor.shape), tensor.dtype, quantizer)
    elif noop is not None and bool(noop):
        return output
    x = tensor.detach().float()
    if is_delayed(quantizer):
        note_largest(x, quantizer)
        scale = quantizer.scale
    else:
        scale = _scale_of(x, quantizer)
    most = LARGEST[quantizer.dtype]
    rounded = (x * scale).clamp(-most, most).to(TORCH[quantizer.dtype]).view(torch.uint8)
    output._scale_inv.copy_(1 / scale)
    if output._data is not None:
        output._data.copy_(rounded.view(output._data.shape))
    if output._transpose is not None:
        output._transpose.copy_(fp8_transpose(rounded, quantizer.dtype).view_as(output._transpose))
        output._transpose_invalid = False
    return output


def note_largest(x: torch.Tensor, quantizer: Any) -> None:
    if quantizer.amax.numel():  # none where the scale is given
        quantizer.amax.copy_(torch.maximum(quantizer.amax, largest(x).view_as(quantizer.amax)))


def largest(x: torch.Tensor) -> torch.Tensor:
    return x.abs().max() if x.numel() else x.new_zeros(())


def is_delayed(quantizer: Any) -> bool:
    """Return whether the scale is of earlier steps, and not of the tensor itself."""
    return not hasattr(quantizer, "with_amax_reduction")


def _scale_of(x: torch.Tensor, quantizer: Any) -> torch.Tensor:
    amax = largest(x)
    if quantizer.with_amax_reduction:
        dist.all_reduce(
            amax, dist.ReduceOp.MAX, group=quantizer._canonicalized_amax_reduction_group()
        )
    epsilon = max(quantizer.amax_epsilon, torch.finfo(torch.float32).tiny)
    scale = LARGEST[quantizer.dtype] / amax.clamp(min=epsilon) if amax > 0 else torch.ones(())
    return 2.0 ** scale.log2().floor() if quantizer.force_pow_2_scales else scale


def new_output(shape: tuple[int, ...], dtype: torch.dtype, quantizer: Any) -> Any:
    """Return an empty FP8 tensor of the class that the quantizer asks for."""
    from transformer_engine.pytorch import Float8Tensor, Float8TensorStorage

    rows = torch.empty(shape, dtype=torch.uint8) if quantizer.rowwise_usage else None
    columns = None
    if quantizer.columnwise_usage:
        columns = torch.empty((shape[-1], *shape[:-1]), dtype=torch.uint8)
    parts = {
        "data": rows, "fp8_scale_inv": torch.empty(1), "fp8_dtype": quantizer.dtype,
        "data_transpose": columns, "quantizer": quantizer,
    }  # fmt: skip
    if quantizer.internal:
        return Float8TensorStorage(**parts, **_fake_dtype(Float8TensorStorage, dtype))
    return Float8Tensor(shape=shape, dtype=dtype, **parts)


def create_empty_quantized_tensor(
    quantizer: Any, shape: list[int], dtype: Any, device: Any, pin_memory: bool
) -> Any:
    return new_output(tuple(shape), TORCH.get(dtype, dtype), quantizer)


def _fake_dtype(storage: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Return the dtype that newer versions want to know of every holder."""
    return {"fake_dtype": dtype} if "fake_dtype" in storage.__new__.__kwdefaults__ else {}


def dequantize(tensor: Any, kind: Any) -> torch.Tensor:
    return values(tensor._data, tensor).to(TORCH[DType(int(kind))])


def values(data: torch.Tensor, tensor: Any) -> torch.Tensor:
    """Return what bytes of an FP8 tensor stand for, in fp32."""
    return data.view(TORCH[DType(int(tensor._fp8_dtype))]).float() * tensor._scale_inv


def fp8_transpose(data: torch.Tensor, kind: Any, out: Any = None) -> torch.Tensor:
    """Return [k, ...] of [..., k]: the last dimension comes first."""
    found = data.reshape(-1, data.shape[-1]).t().reshape(data.shape[-1], *data.shape[:-1])
    return found.contiguous() if out is None else out.copy_(found)


def bgrad_quantize(tensor: torch.Tensor, quantizer: Any) -> tuple[torch.Tensor, Any]:
    """Return the bias's gradient beside the rounded gradient."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows.float().sum(0).to(tensor.dtype), quantize(tensor, quantizer)


def split_quantize(
    tensor: torch.Tensor, sizes: list[int], quantizers: list[Any], *_: Any
) -> list[Any]:
    return [quantize(t, q) for t, q in zip(tensor.split(sizes), quantizers, strict=True)]


def compute_amax(tensor: torch.Tensor, amax: torch.Tensor) -> None:
    amax.fill_(largest(tensor.float()))


def fused_amax_and_scale_update_after_reduction(
    reduced: torch.Tensor,
    histories: list[Any],
    scales: list[Any],
    rule: str,
    kind: Any,
    margin: float,
) -> None:
    """Take in the largest values of a step, and derive the scales of the next one."""
    start = 0
    for history, scale in zip(histories, scales, strict=True):
        newest = reduced[start : start + scale.numel()]
        start += scale.numel()
        amax = newest if rule == "most_recent" else torch.maximum(newest, history[1:].amax(0))
        if rule != "most_recent" and history.shape[0] == 1:
            amax = newest
        kept = torch.cat([newest[None], history[1:]])
        history.copy_(torch.roll(kept, -1, 0))
        history[0] = 0
        new = LARGEST[DType(int(kind))] / amax / 2.0**margin
        new = torch.where(new.isinf(), torch.finfo(torch.float32).max, new)
        scale.copy_(torch.where((amax > 0) & amax.isfinite(), new, scale))
