"""Matrix products: plain, of FP8 operands, with bias, bias gradient and sums into the output."""

from typing import Any

import torch

from transformer_engine_torch.buffers import after_product, before_product
from transformer_engine_torch.enums import TORCH, DType
from transformer_engine_torch.rounding import quantize, values


def generic_gemm(
    a: Any, transa: bool, b: Any, transb: bool, out: Any, quantizer: Any, out_kind: Any, bias: Any,
    bias_kind: Any, gelu: bool, gelu_in: Any, grad: bool, workspace: Any, workspace_size: int,
    accumulate: bool, use_split_accumulator: bool, comm_overlap: Any = None, comm_type: Any = None,
    extra_output: Any = None, bulk_overlap: bool = False, alpha: float = 1.0, beta: Any = None,
) -> tuple[Any, Any, Any, Any]:  # fmt: skip
    """Return ``op(b) op(a)``, the bias's gradient, nothing, and what the ranks exchanged.

    On Hopper FP8 products read both operands along the summed dimension, so one of them must be there
    transposed; an operand that the Python half has let go of fails here as it does there.
    """
    assert not gelu
    before_product(comm_overlap, comm_type)
    left, right = _matrix(b, not transb), _matrix(a, transa)
    summed = left.shape[1]
    assert right.shape[1] == summed, f"{tuple(left.shape)} by {tuple(right.shape)} transposed"
    if not isinstance(a, torch.Tensor) or hasattr(a, "_scale_inv"):
        assert summed % 16 == 0 and right.shape[0] % 16 == 0, "FP8 products need multiples of 16"
    product = alpha * (left @ right.t())
    bias_gradient = None
    if bias is not None and grad:
        bias_gradient = _matrix(b, False).float().sum(1).to(bias.dtype)
    elif bias is not None and bias.numel():
        product = product + bias.float()
    kind = TORCH[DType(int(out_kind))] if out_kind is not None else None
    if out is not None:
        out.copy_(product + out.float() if accumulate else product)
    else:
        shape = product.shape if transb else (*_shape(b)[:-1], product.shape[-1])
        out = product.view(shape)
        out = quantize(out.to(kind), quantizer) if quantizer is not None else out.to(kind)
    after_product(comm_overlap, comm_type, out, extra_output, bulk_overlap)
    return out, bias_gradient, None, extra_output


def _shape(x: Any) -> tuple[int, ...]:
    return tuple(x.size()) if not isinstance(x, torch.Tensor) else tuple(x.shape)


def _matrix(x: Any, is_row: bool) -> torch.Tensor:
    """Return an operand in fp32 with the summed dimension last: of its rows, or of its columns."""
    if hasattr(x, "_scale_inv"):
        data = x._data if is_row else x._transpose
        assert data is not None, "the operand has let go of the data that this product reads"
        assert is_row or not x._transpose_invalid, "the transposed operand is of an earlier value"
        data = data.reshape(-1, data.shape[-1]) if is_row else data.reshape(data.shape[0], -1)
        return values(data, x)
    flat = x.detach().reshape(-1, x.shape[-1])
    flat = flat if flat.dtype == torch.float64 else flat.float()
    return flat if is_row else flat.t()


def get_cublasLt_version() -> int:
    return 130000


def get_num_cublas_streams() -> int:
    return 4
