"""Measures what a rank of this machine's CPU can do, as the fields of a hardware profile.

    python -m tools.cpu_profile --ranks 2

All ranks work at the same time, one thread each, as in a run: matrix products of 1,024 tokens at
several widths, a sum of two large arrays, and gloo's all-gather. Nothing of a training run is
measured, so a profile made of it is no fit to the runs that it then predicts.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from megatron_eso.launch.processes import free_port
from tools.arguments import at_least_1

TOKENS, WIDTHS, ROUNDS = 1024, (64, 128, 256, 512, 1024), 7
GATHERED_BYTES, SUMMED_BYTES = 2 << 20, 64 << 20


def main() -> None:
    """Measure and print YAML."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=at_least_1, default=2, help="ranks to start [2]")
    options = parser.parse_args()
    results: Any = processes.get_context("spawn").SimpleQueue()
    processes.spawn(_rank, (options.ranks, free_port(), results), nprocs=options.ranks)
    found = [results.get() for _ in range(options.ranks)]
    speeds = [statistics.mean(one["products"][i] for one in found) for i in range(len(WIDTHS))]
    # speed = peak w / (w + half), so w / speed is linear in w.
    slope, offset = np.polyfit(WIDTHS, np.array(WIDTHS) / np.array(speeds), 1)
    print(f"# products of {TOKENS} tokens, GFLOP/s: "
          + ", ".join(f"{w} wide {s / 1e9:.0f}" for w, s in zip(WIDTHS, speeds, strict=True)))  # fmt: skip
    print(f"bf16_tflops: {1 / slope / 1e12:.3f}")
    print(f"memory_tb_per_second: {statistics.mean(one['memory'] for one in found) / 1e12:.4f}")
    print(f"node_link_gb_per_second: {statistics.mean(one['link'] for one in found) / 1e9:.2f}")
    print(f"half_width: {max(offset / slope, 1):.0f}")


def _rank(rank: int, num_ranks: int, port: int, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=num_ranks)
    products = []
    for width in WIDTHS:
        a, b = torch.randn(TOKENS, 4 * width), torch.randn(4 * width, width)
        products.append(2 * a.numel() * width / _seconds(lambda a=a, b=b: a @ b))
    one, two = torch.randn(SUMMED_BYTES // 4), torch.randn(SUMMED_BYTES // 4)
    out = torch.empty_like(one)
    memory = 3 * SUMMED_BYTES / _seconds(lambda: torch.add(one, two, out=out))
    part = torch.randn(GATHERED_BYTES // 4 // num_ranks)
    parts = [torch.empty_like(part) for _ in range(num_ranks)]
    gathered = _seconds(lambda: dist.all_gather(parts, part), together=True)
    link = (num_ranks - 1) * part.nbytes / gathered
    results.put({"products": products, "memory": memory, "link": link})
    dist.destroy_process_group()


def _seconds(work: Callable[[], Any], *, together: bool = False) -> float:
    """Return the median time of one call, from several in a row.

    ``together``: make the same number of calls on all ranks.
    """
    work()
    times = []
    for _ in range(ROUNDS):
        dist.barrier()
        calls, begin = 0, time.perf_counter()
        while calls < 20 if together else time.perf_counter() - begin < 0.1:
            work()
            calls += 1
        times.append((time.perf_counter() - begin) / calls)
    return statistics.median(times)


if __name__ == "__main__":
    main()
