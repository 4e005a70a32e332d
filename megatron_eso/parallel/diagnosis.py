"""What this machine has, and what the ``auto`` settings would make of it."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import psutil
import torch

from megatron_eso.config import load_config
from megatron_eso.config.precision_rules import ASKED
from megatron_eso.parallel.matmul_speed import matmul_flops_per_second
from megatron_eso.parallel.te_adapter import describe_machine
from megatron_eso.parallel.te_diagnosis import Finding, megatron_version, te_findings


def diagnose() -> list[Finding]:
    """Return findings about machine, packages and backends; measuring takes about a second."""
    return [*_machine(), *_packages(), *_speed(), *_backends()]


def _machine() -> list[Finding]:
    memory = psutil.virtual_memory()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(gpus)) or "none"
    return [
        Finding("Python", platform.python_version(), "3.11 and 3.12 are tested"),
        Finding(
            "CPU", f"{os.cpu_count()} cores", f"threads that torch uses: {torch.get_num_threads()}"
        ),
        Finding(
            "memory", f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free", ""
        ),
        Finding("GPU", names, "NCCL, one rank per GPU" if gpus else "gloo ranks on the CPU"),
    ]


def _packages() -> list[Finding]:
    needed = {
        "torch": "required",
        "megatron-core": "required",
        "omegaconf": "required",
        "mosaicml-streaming": "writes and shuffles shards",
        "tokenizers": "text in and out",
        "tensorboard": "training curves",
        "transformer-engine": "FP8 and fused layers (GPU only)",
        "apex": "optional: a fused Adam on a GPU without Transformer Engine",
        "transformers": "optional: Hugging Face export",
    }
    return [Finding(name, _version(name), use) for name, use in needed.items()]


def _speed() -> list[Finding]:
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    fp32 = matmul_flops_per_second(torch.float32, device) / 1e9
    bf16 = matmul_flops_per_second(torch.bfloat16, device) / 1e9
    better = "bf16" if device.type == "cuda" or bf16 > 1.5 * fp32 else "fp32"
    return [
        Finding("matmul fp32", f"{fp32:,.0f} GFLOP/s", ""),
        Finding("matmul bf16", f"{bf16:,.0f} GFLOP/s", f"precision.dtype=auto chooses {better}"),
    ]


def _backends() -> list[Finding]:
    config = load_config(None, list(ASKED["te"]))
    return [
        Finding("attention split", "fused causal kernel and analytic self term", "auto chooses it"),
        Finding("attention dense", "explicit mask", "the oracle of tests; slow"),
        Finding("layers torch", "Megatron-Core's own", "auto takes them without a GPU"),
        *te_findings(describe_machine(), megatron_version(), config),
    ]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "-"
