"""The device a rank runs on: the CPU with gloo, or a GPU with NCCL. Only this module decides which."""

import os
import platform
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from megatron_eso.errors import ConfigError
from megatron_eso.launch.environment import GPUS_VARIABLE, Ranks
from megatron_eso.parallel.megatron_patches import apply_cpu_patches, silence_megatron_messages


@dataclass(frozen=True)
class Device:
    """The device of this rank."""

    torch_device: torch.device
    backend: str

    @property
    def is_cuda(self) -> bool:
        """True on a GPU."""
        return self.torch_device.type == "cuda"

    def memory_gib(self) -> float:
        """Return this rank's memory in GiB: a GPU's peak, or the process's current use on a CPU."""
        if self.is_cuda:
            return torch.cuda.max_memory_allocated() / 2**30
        return psutil.Process().memory_info().rss / 2**30

    def gpu_name(self) -> str:
        """Return the driver's name for the GPU; empty on a CPU."""
        return torch.cuda.get_device_name(self.torch_device) if self.is_cuda else ""


def choose_device(local_rank: int) -> Device:
    """Return this rank's GPU; if there is none, patch Megatron for the CPU and return the CPU."""
    silence_megatron_messages()
    if torch.cuda.is_available():
        index = gpu_of_rank(local_rank, torch.cuda.device_count(), os.environ)
        torch.cuda.set_device(index)
        return Device(torch.device("cuda", index), "nccl")
    require_no_gpu_was_asked_for(os.environ)
    apply_cpu_patches()
    return Device(torch.device("cpu"), "gloo")


def require_no_gpu_was_asked_for(environ: Mapping[str, str]) -> None:
    """Refuse to train on the CPU in a job that asked for GPUs: it would silently take weeks.

    Raises:
        ConfigError: if our job script asked for GPUs.
    """
    number = int(environ.get(GPUS_VARIABLE) or 0)
    if number > 0:
        raise ConfigError(
            f"this job asked for {number} GPUs a node (cluster.gpus_per_node), but PyTorch "
            f"{torch.__version__} on {platform.node()} sees none (CUDA_VISIBLE_DEVICES="
            f"{environ.get('CUDA_VISIBLE_DEVICES', 'not set')}): its build may have no CUDA, or the "
            "driver is missing or too old; `megatron-eso doctor` shows more"
        )


def gpu_of_rank(local_rank: int, num_gpus: int, environ: Mapping[str, str]) -> int:
    """Return the index of this rank's GPU among those that the process sees.

    Raises:
        ConfigError: if there are fewer GPUs than ranks on this node.
    """
    if num_gpus == 1 and environ.get("SLURM_LOCALID") == str(local_rank):
        return 0  # a task of srun --gpus-per-task=1 sees only its own GPU
    if local_rank >= num_gpus:
        raise ConfigError(
            f"rank {local_rank} of this node (LOCAL_RANK) has no GPU: {num_gpus} can be seen "
            f"(CUDA_VISIBLE_DEVICES={environ.get('CUDA_VISIBLE_DEVICES', 'not set')}); start one rank "
            "per GPU (--ranks, parallel.local_ranks, the job's tasks per node)"
        )
    return local_rank


def idle_gpus(device: Device, num_ranks: int) -> list[str]:
    """Return a line if fewer ranks of this node were started than it has GPUs in sight, else nothing."""
    seen = torch.cuda.device_count() if device.is_cuda else 0
    if num_ranks >= seen:
        return []
    used = f"{num_ranks} of the {seen} GPUs seen here {'is' if num_ranks == 1 else 'are'} used"
    return [f"{used}; --ranks {seen} uses all of them"]


# With these, results of NCCL, cuBLAS and Transformer Engine do not depend on timing (Megatron-LM asks for
# the same). Each name has its allowed values; the first is set where the environment has none.
_DETERMINISTIC = {
    "NCCL_ALGO": ("Ring", "Tree", "CollnetDirect", "CollnetChain", "^NVLS"),
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
}


def be_deterministic(environ: MutableMapping[str, str]) -> None:
    """Make CUDA results repeatable; call before the process group starts.

    Raises:
        ConfigError: if the environment asks for the opposite.
    """
    for name, right in _DETERMINISTIC.items():
        if not set(environ.setdefault(name, right[0]).split(",")) <= set(right):
            raise ConfigError(
                f"precision.deterministic=true with {name}={environ[name]} in the environment: it must be "
                f"among {', '.join(right)}; unset it or set precision.deterministic=false"
            )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def prepare_for_graphs(environ: MutableMapping[str, str]) -> None:
    """Set what CUDA graphs that contain collectives need; call before the process group starts.

    NCCL registers the buffers of captured collectives. With expandable segments that leads to illegal
    memory accesses on GPUs before Blackwell (Megatron-Core's transformer/cuda_graphs.py refuses it).

    Raises:
        ConfigError: if the environment asks for both.
    """
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if "expandable_segments:True" not in environ.get(name, ""):
            continue
        if environ.setdefault("NCCL_GRAPH_REGISTER", "0") != "0":
            raise ConfigError(
                f"parallel.cuda_graphs=true with {name}={environ[name]} and NCCL_GRAPH_REGISTER="
                f"{environ['NCCL_GRAPH_REGISTER']} in the environment: NCCL cannot register expandable "
                "segments; unset one of the two"
            )


def start_process_group(ranks: Ranks, device: Device, *, timeout_seconds: float = 600.0) -> None:
    """Join the process group, also for a single rank (Megatron needs one).

    NCCL is not told the device and uses the current one. If told, each group would use one communicator for
    everything, in which the exchanges between two stages wait for all others.

    Args:
        ranks: this process's place.
        device: gives the backend.
        timeout_seconds: limit for the ranks to meet, and for every collective of the whole group.
    """
    if dist.is_initialized():
        return
    timeout = timedelta(seconds=timeout_seconds)
    if "MASTER_ADDR" not in os.environ and ranks.world_size == 1:
        store = HashStore()
        dist.init_process_group(device.backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    dist.init_process_group(
        device.backend, rank=ranks.rank, world_size=ranks.world_size, timeout=timeout
    )
