"""How fast this machine multiplies large matrices: the peak that training is measured against."""

import time

import torch
import torch.distributed as dist

_SIZE_CPU, _SIZE_GPU = 1024, 4096  # on a GPU, a smaller product would only time the kernel launch


def matmul_flops_per_second(
    dtype: torch.dtype, device: torch.device, *, size: int | None = None, seconds: float = 0.2
) -> float:
    """Return the FLOP/s of a square matmul with this process's threads.

    Args:
        dtype: number format of the matrices.
        device: where to run.
        size: rows and columns; None: large enough to keep the device busy.
        seconds: how long to repeat; the best repetition counts.
    """
    size = size or (_SIZE_GPU if device.type == "cuda" else _SIZE_CPU)
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    torch.mm(left, right)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def faster_cpu_dtype(device: torch.device) -> str:
    """Return bf16 if, on every rank, it multiplies over 1.5 times as fast as fp32; else fp32.

    CPUs without bf16 instructions emulate bf16, much more slowly than fp32.
    """
    fp32 = matmul_flops_per_second(torch.float32, device, size=512, seconds=0.1)
    bf16 = matmul_flops_per_second(torch.bfloat16, device, size=512, seconds=0.1)
    vote = torch.tensor([1 if bf16 > 1.5 * fp32 else 0], dtype=torch.int32)
    if dist.is_initialized():
        dist.all_reduce(vote, op=dist.ReduceOp.MIN)
    return "bf16" if vote.item() else "fp32"
