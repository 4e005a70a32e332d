"""A GPU that computes nothing: PyTorch's meta device, watched for what a real GPU refuses.

Operators on it check shapes and formats. In addition, no operator may take tensors of the GPU and of the
host together, and none may wait for a value that the GPU has yet to compute. Collectives go nowhere.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from megatron_eso.eval import evaluate as evaluate_module
from megatron_eso.model import eso_model
from megatron_eso.model.attention import kernels
from megatron_eso.parallel import device as device_module
from megatron_eso.parallel import exchange
from megatron_eso.parallel.megatron_patches import (
    NoStream,
    importing_megatron,
    silence_megatron_messages,
)
from megatron_eso.train import session as session_module
from megatron_eso.train import step as step_module
from tests import rank_jobs
from tests.cpu_graphs import has_mask_as_index
from tests.replaced import replaced

with importing_megatron():
    from megatron.core.tensor_parallel import random as megatron_random

GPU = torch.device("meta")


class Event(NoStream):
    """An event of a GPU that computes nothing."""

    def elapsed_time(self, end: "Event") -> float:
        """Return the milliseconds from this event to another."""
        return 1.0


_MOVES = ("aten::copy_", "aten::_to_copy")
_WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")


class Watch(TorchDispatchMode):
    """Raises on operators that a real GPU refuses or waits for; counts those that run on it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_operators = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = function._schema.name, kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_gpu = [x for x in tensors if x.device == GPU]
        if not on_gpu:
            return function(*args, **kwargs)
        # A GPU's operators accept single numbers from the host.
        elsewhere = [x for x in tensors if x.device != GPU and x.dim() > 0]
        if elsewhere and name not in _MOVES:
            shapes = [(x.device.type, *x.shape) for x in tensors]
            raise RuntimeError(f"{name} takes tensors of the GPU and of the host: {shapes}")
        if name in _WAITS or has_mask_as_index(name, args):
            raise RuntimeError(f"{name} waits for the GPU")
        if name.startswith("c10d::"):  # has no form for meta tensors
            args, kwargs = tree_map(_host_memory, (args, kwargs))
        self.num_operators += 1
        return function(*args, **kwargs)


class _CudaNamesMeanMeta(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = GPU
        if function is Tensor.cuda:
            return args[0].to(GPU)
        found = function(*args, **kwargs)
        is_name = function is Tensor.type and len(args) == 1 and not kwargs
        return found.replace("torch.meta.", "torch.cuda.") if is_name else found


def _host_memory(x: Any) -> Any:
    return torch.empty(x.shape, dtype=x.dtype) if isinstance(x, Tensor) else x


def _to(module: nn.Module, device: torch.device) -> nn.Module:
    """Move a module's parameters; PyTorch's own refuses to take real ones to the meta device."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.device != device:
                moved = nn.Parameter(parameter.detach().to(device))
                moved.__dict__.update(parameter.__dict__)
                part._parameters[name] = moved
    return module


def _same_from_all(found: list[Any], mine: Any, group: Any = None) -> None:
    found[:] = [mine] * len(found)


@contextlib.contextmanager
def _no_fork(tracker: Any, name: str | None = None) -> Iterator[None]:
    yield


def _nothing() -> Any:
    """Return a new function that does nothing: torch.compile distinguishes functions by identity."""
    return lambda *args, **kwargs: None


def _stand_ins(cudnn: int) -> list[tuple[Any, str, Any]]:
    facts = kernels.Facts("cuda", (9, 0), cudnn)
    cuda: dict[str, Any] = {
        "current_device": lambda: GPU,
        "current_stream": lambda *args: NoStream(), "default_stream": lambda *args: NoStream(),
        "Stream": NoStream, "Event": Event,
        "stream": lambda stream: contextlib.nullcontext(),
        "get_device_capability": lambda *args: (9, 0), "get_device_name": lambda *args: "NVIDIA H100",
        "synchronize": _nothing(), "set_device": _nothing(), "empty_cache": _nothing(),
        "manual_seed": _nothing(),
        "get_rng_state": lambda *args: torch.get_rng_state(),
    }  # fmt: skip
    return [
        *((torch.cuda, name, value) for name, value in cuda.items()),
        (megatron_random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state()),
        (megatron_random, "_set_cuda_rng_state", _nothing()),
        (megatron_random.CudaRNGStatesTracker, "fork", _no_fork),
        (nn.Module, "to", _to),
        (dist, "all_gather_object", _same_from_all),
        (device_module.Device, "is_cuda", property(lambda device: True)),
        (eso_model, "_device", lambda config: GPU),
        (kernels, "facts_of", lambda device: facts if device == GPU else kernels.Facts("cpu")),
        (session_module, "facts_of", lambda device: facts),
        (session_module, "choose_device", lambda rank: device_module.Device(GPU, "fake")),
        (session_module, "any_rank", lambda flags, device: flags),
        (exchange, "any_rank", lambda flags, device: flags),
        (step_module, "sum_over_ranks", lambda values, device: [100.0 for _ in values]),
        # Rows come from the first rank of a replica, over collectives.
        (evaluate_module, "read_together", lambda read, *args, **kwargs: read()),
        (rank_jobs, "read_together", lambda read, *args, **kwargs: read()),
        # The end of a step: what it reports is read from the GPU.
        (Tensor, "tolist", _tolist(Tensor.tolist)),
    ]


def _tolist(real: Any) -> Any:
    return lambda x: [1.0] * x.numel() if x.device == GPU else real(x)


@contextlib.contextmanager
def instead_of_a_gpu(*, num_ranks: int, cudnn: int) -> Iterator[Watch]:
    """Make sessions within the block those of rank 0 of ``num_ranks`` on an H100 with this cuDNN."""
    silence_megatron_messages()
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    try:
        with replaced(_stand_ins(cudnn)), _CudaNamesMeanMeta(), Watch() as watch:
            yield watch
    finally:
        dist.destroy_process_group()
