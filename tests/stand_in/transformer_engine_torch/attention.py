"""cuDNN's fused attention of an H100, in plain torch: which kinds it has, forwards and backwards."""

from typing import Any

import torch

from transformer_engine_torch.enums import (
    RELEASE,
    TORCH,
    DType,
    NVTE_Bias_Type,
    NVTE_Fused_Attn_Backend,
    NVTE_Mask_Type,
    NVTE_QKV_Layout,
    NVTE_Softmax_Type,
)
from transformer_engine_torch.rounding import (
    LARGEST,
    is_delayed,
    largest,
    note_largest,
    quantize,
    values,
)

CUDNN = 91400
_TWO_SAVED = RELEASE < (2, 20)
"""FP8's forward pass saves rows' largest score and 1 / sum; from 2.20 on what bf16's does, log(sum)."""
_CAUSAL = NVTE_Mask_Type.NVTE_CAUSAL_MASK
_MASKS = (NVTE_Mask_Type.NVTE_NO_MASK, _CAUSAL)


def get_cudnn_version() -> int:
    return CUDNN


def get_fused_attn_backend(*asked: Any) -> Any:
    """Return the kernel of an H100 with cuDNN 9.14 for rows of one length, as far as they are used here.

    From 2.20 on the question is one dataclass, and the reason of a refusal comes with the answer.
    """
    if len(asked) > 1:
        _, q_kind, _, _, bias, mask, softmax, _, heads, groups, _, _, qk_size, v_size, *_ = asked
        return _kernel(asked[0], q_kind, bias, mask, softmax, heads, groups, qk_size, v_size)[0]
    (a,) = asked
    return _kernel(
        a.is_training, a.qkv_dtype, a.bias_type, a.attn_mask_type, a.softmax_type,
        a.num_attn_heads, a.num_gqa_groups, a.head_dim_qk, a.head_dim_v,
    )  # fmt: skip


def _kernel(
    is_training: bool, q_kind: Any, bias: Any, mask: Any, softmax: Any, num_heads: int, num_groups: int,
    qk_size: int, v_size: int,
) -> tuple[NVTE_Fused_Attn_Backend, str]:  # fmt: skip
    backends = NVTE_Fused_Attn_Backend
    if bias != NVTE_Bias_Type.NVTE_NO_BIAS or softmax != NVTE_Softmax_Type.NVTE_VANILLA_SOFTMAX:
        return backends.NVTE_No_Backend, "a bias or another softmax"
    if mask not in _MASKS or num_heads % num_groups:
        return backends.NVTE_No_Backend, "another mask, or heads that do not divide"
    if q_kind in (DType.kFloat8E4M3, DType.kFloat8E5M2):
        fits = (qk_size, v_size) == (128, 128) if is_training else max(qk_size, v_size) <= 256
        found = backends.NVTE_FP8
    elif q_kind in (DType.kFloat16, DType.kBFloat16):
        fits = qk_size % 8 == v_size % 8 == 0 and max(qk_size, v_size) <= 256
        found = backends.NVTE_F16_arbitrary_seqlen
    else:
        return backends.NVTE_No_Backend, "another format"
    return (found, "") if fits else (backends.NVTE_No_Backend, "another head size")


def fused_attn_fwd(
    q_length: int, kv_length: int, is_training: bool, scale: float, dropout: float, *rest: Any
) -> list[Any]:
    """Return the output [L, R, h, d] of queries, keys and values, and what the backward pass reads."""
    layout, mask, (cu_q, _, q, k, v) = _told(rest, 5)
    s_quantizer, o_quantizer = _quantizers(rest, 2)
    assert dropout == 0.0 and cu_q.numel() == _heads_first(q, layout).shape[0] + 1
    scores, wide_v = _scores(q, k, v, scale, layout, mask)
    peak = scores.amax(-1, keepdim=True)
    total = (scores - peak).exp().sum(-1, keepdim=True)
    weights = (scores - peak).exp() / total
    out = _back(_rounded(weights, s_quantizer) @ wide_v, layout).to(q.dtype)
    state = torch.zeros(2, dtype=torch.int64)
    if s_quantizer is not None and is_delayed(o_quantizer):
        out = quantize(out, o_quantizer)
    saved = [peak, 1 / total] if s_quantizer is not None and _TWO_SAVED else [peak + total.log()]
    return [out, *saved, state]


def fused_attn_bwd(
    q_length: int, kv_length: int, scale: float, dropout: float, *rest: Any
) -> list[Any]:
    """Return the gradients of queries, keys and values, and none of a bias or an offset."""
    layout, mask, (_, _, q, k, v, o, grad) = _told(rest, 7)
    saved = next(x for x in rest if isinstance(x, list))
    s_quantizer, dp_quantizer, out_quantizer = _quantizers(rest, 3)
    scores, wide_v = _scores(q, k, v, scale, layout, mask)
    weights = (scores - saved[0]).exp()
    if s_quantizer is not None and _TWO_SAVED:
        weights = weights * saved[1]
    d_out, out = _heads_first(grad, layout), _heads_first(o, layout)
    inner = (d_out * out).sum(-1, keepdim=True)
    d_weights = weights * (d_out @ wide_v.transpose(-1, -2) - inner)
    d_scores = _rounded(d_weights, dp_quantizer) * scale
    wide_q, wide_k = _heads_first(q, layout), _heads_first(k, layout)
    groups = wide_q.shape[1] // wide_k.shape[1]
    dq = d_scores @ _repeated(wide_k, groups)
    dk = _summed(d_scores.transpose(-1, -2) @ wide_q, groups)
    dv = _summed(_rounded(weights, s_quantizer).transpose(-1, -2) @ d_out, groups)
    fake_dtype = next(x for x in rest if isinstance(x, torch.dtype))
    found = [_back(x, layout).to(fake_dtype) for x in (dq, dk, dv)]
    if out_quantizer is not None and is_delayed(out_quantizer):
        found = [quantize(x, out_quantizer) for x in found]
    return [*found, None, None]


def _told(rest: tuple[Any, ...], number: int) -> tuple[Any, Any, tuple[Any, ...]]:
    """Return layout, mask and tensors among arguments whose places differ between versions.

    Tensors follow the window, a tuple, and what is true or false of it.
    """
    layout = next(x for x in rest if isinstance(x, NVTE_QKV_Layout))
    mask = next(x for x in rest if isinstance(x, NVTE_Mask_Type))
    start = next(i for i, x in enumerate(rest) if isinstance(x, tuple)) + 1
    while isinstance(rest[start], bool):
        start += 1
    tensors = rest[start : start + number]
    if str(layout.name).count("HD") == 3 and "3" not in layout.name and "2" not in layout.name:
        # Kernels get pointers and read as if nothing lay between the rows.
        assert all(getattr(x, "_data", x).is_contiguous() for x in tensors[-number + 2 :])
    return layout, mask, tensors


def _quantizers(rest: tuple[Any, ...], number: int) -> list[Any]:
    """Return the quantizers among arguments whose places differ between versions; none if not FP8."""
    found = [x for x in rest if hasattr(x, "rowwise_usage")]
    assert len(found) in (0, number), f"{len(found)} quantizers, not {number}"
    return found or [None] * number


def _scores(q: Any, k: Any, v: Any, scale: float, layout: Any, mask: Any) -> tuple[Any, Any]:
    wide_q, wide_k, wide_v = (_heads_first(x, layout) for x in (q, k, v))
    groups = wide_q.shape[1] // wide_k.shape[1]
    scores = scale * wide_q @ _repeated(wide_k, groups).transpose(-1, -2)
    if mask == _CAUSAL:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores, _repeated(wide_v, groups)


def _heads_first(x: Any, layout: Any) -> torch.Tensor:
    """Return [R, h, L, d] in fp32."""
    data = values(x._data, x) if hasattr(x, "_scale_inv") else x.detach().float()
    is_rows_first = NVTE_QKV_Layout(int(layout)).name.startswith("NVTE_BS")
    return data.permute(0, 2, 1, 3) if is_rows_first else data.permute(1, 2, 0, 3)


def _back(x: torch.Tensor, layout: Any) -> torch.Tensor:
    is_rows_first = NVTE_QKV_Layout(int(layout)).name.startswith("NVTE_BS")
    return (x.permute(0, 2, 1, 3) if is_rows_first else x.permute(2, 0, 1, 3)).contiguous()


def _repeated(x: torch.Tensor, groups: int) -> torch.Tensor:
    return x.repeat_interleave(groups, dim=1)


def _summed(x: torch.Tensor, groups: int) -> torch.Tensor:
    return x.unflatten(1, (-1, groups)).sum(2)


def _rounded(x: torch.Tensor, quantizer: Any) -> torch.Tensor:
    """Return an intermediate value as FP8 holds it, with its scale of earlier steps."""
    if quantizer is None:
        return x
    most, kind = LARGEST[quantizer.dtype], TORCH[quantizer.dtype]
    if is_delayed(quantizer):
        note_largest(x, quantizer)
        scale = quantizer.scale
    else:
        scale = most / largest(x)
    return (x * scale).clamp(-most, most).to(kind).float() / scale
