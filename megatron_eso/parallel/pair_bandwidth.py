"""How fast is an all-reduce between this node and its neighbours? One process per node, before step 0.

    python -m megatron_eso.parallel.pair_bandwidth --run RUN --attempt 7.0 --nodes a,b,c --port 20000

reports to launch/records.py: neighbour -> speed or what went wrong. Pairs are joined one by one, each
in a group of its own, so that a node that is cut off fails its own pairs and no others. With GPUs the
first one of each node is used.
"""

import argparse
import os
import statistics
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from megatron_eso.launch.environment import node_name
from megatron_eso.launch.pairs import rounds
from megatron_eso.launch.records import Records

_MIB_GPU, _MIB_CPU, _REPEATS = 256, 16, 3
_TIMEOUT = timedelta(seconds=45)


def measure(host: str, port: int, rank: int) -> float:
    """Return the GB/s of an all-reduce between two processes; rank 0 is on ``host``.

    Raises:
        RuntimeError: if the other process does not answer (torch's errors derive from it).
    """
    store = TCPStore(host, port, 2, is_master=rank == 0, timeout=_TIMEOUT)
    is_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if is_gpu else torch.device("cpu")
    dist.init_process_group(
        "nccl" if is_gpu else "gloo", store=store, rank=rank, world_size=2, timeout=_TIMEOUT
    )
    try:
        values = torch.ones((_MIB_GPU if is_gpu else _MIB_CPU) << 18, device=device)
        seconds = [_time(values, device) for _ in range(1 + _REPEATS)][1:]
        # Rank 0 holds the store, and must not leave while the other needs it.
        dist.barrier()
    finally:
        dist.destroy_process_group()
    return values.numel() * values.element_size() / statistics.median(seconds) / 1e9


def _time(values: torch.Tensor, device: torch.device) -> float:
    begin = time.perf_counter()
    dist.all_reduce(values)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    """Measure all pairs of this node."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--attempt", required=True)
    parser.add_argument("--nodes", required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    records, node, nodes = Records(options.run), node_name(os.environ), options.nodes.split(",")
    mine, found = nodes.index(node), {}
    # With this, an NCCL timeout raises here, as gloo's does; else it ends the process with its other pairs.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    for number, pairs in enumerate(rounds(len(nodes))):
        for pair in pairs:
            if mine not in pair:
                continue
            other = nodes[pair[1 - pair.index(mine)]]
            # If the process dies here, the report says with which neighbor.
            found[other] = {"error": "not finished"}
            records.set_pair_speeds(options.attempt, node, found)
            try:
                speed = measure(nodes[pair[0]], options.port + number, pair.index(mine))
                found[other] = {"gb_per_second": speed}
            except (RuntimeError, OSError) as error:
                found[other] = {"error": str(error).splitlines()[0][:200]}
            records.set_pair_speeds(options.attempt, node, found)


if __name__ == "__main__":
    main()
