"""The choice among backends, by the same variables; the reasons go to the log."""

import logging
import os
from dataclasses import dataclass, field

import torch


class AttentionLogging:
    _log_level = logging.WARNING
    _stream_handler = logging.StreamHandler()


@dataclass
class AttentionParams:
    qkv_dtype: torch.dtype = torch.bfloat16
    qkv_layout: str = "sbhd_sbhd_sbhd"
    batch_size: int = 1
    num_heads: int = 16
    num_gqa_groups: int = 16
    max_seqlen_q: int = 128
    max_seqlen_kv: int = 128
    head_dim_qk: int = 64
    head_dim_v: int = 64
    attn_mask_type: str = "no_mask"
    deterministic: bool = False
    fp8: bool = False
    fp8_meta: dict | None = field(default=None)


def get_attention_backend(params):
    logger = logging.getLogger("DotProductAttention")
    logger.setLevel(AttentionLogging._log_level)
    if not logger.hasHandlers():
        logger.addHandler(AttentionLogging._stream_handler)
    logger.debug("Running with config=%s", params)
    flash, fused, unfused = (
        os.environ.get(f"NVTE_{name}_ATTN", "1") == "1" for name in ("FLASH", "FUSED", "UNFUSED")
    )
    if flash:
        logger.debug("Disabling FlashAttention 2 as it is not installed")
        flash = False
    if fused and params.head_dim_qk > 256:
        logger.debug("Disabling FusedAttention as no backend supports the provided input")
        fused = False
    available = [flash, fused, unfused]
    return flash, None, fused, None, unfused and not fused, available
