"""A stand-in for Transformer Engine's compiled half, in plain torch on a CPU, for tests alone.

Transformer Engine's other half, its Python code, is the released one (see ``transformer_engine`` beside
this): it decides what is gathered, rounded, saved and summed, and calls the functions here with the
arguments of the version at hand. They compute what the kernels are documented to compute: FP8 products are
exact products of the rounded operands. Kernels, their speed and their rounding are not what it is for.
"""

from typing import Any, NoReturn

from transformer_engine_torch.attention import (
    fused_attn_bwd,
    fused_attn_fwd,
    get_cudnn_version,
    get_fused_attn_backend,
)
from transformer_engine_torch.buffers import (
    CommOverlap,
    CommOverlapHelper,
    CommOverlapP2P,
    bulk_overlap_ag_with_external_gemm,
    device_supports_multicast,
    get_stream_priority_range,
    ubuf_built_with_mpi,
)
from transformer_engine_torch.enums import (
    CommOverlapType,
    DType,
    Float8BlockScaleTensorFormat,
    FP8BwdTensors,
    FP8FwdTensors,
    FP8TensorMeta,
    NVTE_Bias_Type,
    NVTE_Fused_Attn_Backend,
    NVTE_Mask_Type,
    NVTE_QKV_Format,
    NVTE_QKV_Layout,
    NVTE_Softmax_Type,
    NVTEQBHistogramMode,
    NVTERoutingMapFormat,
    NVTEScalingMode,
)
from transformer_engine_torch.norms import layernorm_bwd, layernorm_fwd, rmsnorm_bwd, rmsnorm_fwd
from transformer_engine_torch.optimizers import (
    multi_tensor_adam,
    multi_tensor_compute_scale_and_scale_inv,
    multi_tensor_l2norm,
    multi_tensor_scale,
)
from transformer_engine_torch.products import (
    generic_gemm,
    get_cublasLt_version,
    get_num_cublas_streams,
)
from transformer_engine_torch.rounding import (
    bgrad_quantize,
    compute_amax,
    create_empty_quantized_tensor,
    dequantize,
    fp8_transpose,
    fused_amax_and_scale_update_after_reduction,
    quantize,
    split_quantize,
)

__all__ = [
    "CommOverlap",
    "CommOverlapHelper",
    "CommOverlapP2P",
    "CommOverlapType",
    "DType",
    "FP8BwdTensors",
    "FP8FwdTensors",
    "FP8TensorMeta",
    "Float8BlockScaleTensorFormat",
    "NVTEQBHistogramMode",
    "NVTERoutingMapFormat",
    "NVTEScalingMode",
    "NVTE_Bias_Type",
    "NVTE_Fused_Attn_Backend",
    "NVTE_Mask_Type",
    "NVTE_QKV_Format",
    "NVTE_QKV_Layout",
    "NVTE_Softmax_Type",
    "bgrad_quantize",
    "bulk_overlap_ag_with_external_gemm",
    "compute_amax",
    "create_empty_quantized_tensor",
    "dequantize",
    "device_supports_multicast",
    "fp8_transpose",
    "fused_amax_and_scale_update_after_reduction",
    "fused_attn_bwd",
    "fused_attn_fwd",
    "generic_gemm",
    "get_cublasLt_version",
    "get_cudnn_version",
    "get_fused_attn_backend",
    "get_num_cublas_streams",
    "get_stream_priority_range",
    "layernorm_bwd",
    "layernorm_fwd",
    "multi_tensor_adam",
    "multi_tensor_compute_scale_and_scale_inv",
    "multi_tensor_l2norm",
    "multi_tensor_scale",
    "quantize",
    "rmsnorm_bwd",
    "rmsnorm_fwd",
    "split_quantize",
    "ubuf_built_with_mpi",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Return, for what is imported and not used on this path, a function that says so."""
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"the stand-in has no {name}")

    return absent
