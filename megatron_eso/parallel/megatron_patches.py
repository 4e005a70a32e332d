"""Every change made to Megatron-Core's behavior, with its reason.

Megatron-Core (0.16 to 0.19) writes ``device="cuda"`` and ``torch.cuda.current_device()`` in places
that have nothing to do with a GPU. On a machine without one, :func:`apply_cpu_patches` answers those
calls for the CPU, so that the unmodified package trains over gloo. On a GPU nothing is patched; there,
Transformer Engine, which Megatron imports, is kept from loading a second cuDNN.

tests/test_megatron_patches.py shows for each patch that Megatron still needs it. A patch whose test
fails there can go.
"""

import contextlib
import ctypes
import logging
import os
import sys
import warnings
from collections.abc import Iterator, MutableMapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_CUDA_TYPE_NAMES = {
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
}
# What Megatron prints when it is imported without Apex or Transformer Engine, as on a CPU.
_IMPORT_MESSAGES = (
    ".*Apex is not installed.*",
    ".*Transformer Engine and Apex are not installed.*",
    ".*multi_tensor_applier.*",
)

# Warnings in every training step about calls that Megatron makes and we cannot change. The barrier one is
# PyTorch's: the device it picks over NCCL is right (device.py sets it, and says why groups are not told).
_RUN_MESSAGES = (
    (".*full scope is deprecated.*", UserWarning),
    (".*grad attribute of a Tensor that is not a leaf.*", UserWarning),
    (".*reduce_scatter_tensor. is deprecated.*", FutureWarning),
    (".*all_gather_into_tensor. is deprecated.*", FutureWarning),
    (".*load_state_dict. is deprecated.*", FutureWarning),
    (".*use DTensor instead.*", FutureWarning),
    (".*Apex is not installed.*", UserWarning),
    (".*no need to set 'core_attn' to recompute.*", UserWarning),  # we asked for it
    (".*MimoModelConfig is experimental.*", UserWarning),  # 0.19 imports it for every optimizer
    (".*barrier.*: using the device under current context.*", UserWarning),
    (
        ".*it is recommended to set the environment variable CUDA_DEVICE_MAX_CONNECTIONS.*",
        UserWarning,
    ),
)

_active_mode: "CudaNamesMeanCpu | None" = None


class CudaNamesMeanCpu(TorchFunctionMode):
    """While active, ``device="cuda"`` means the CPU and ``Tensor.type()`` names CUDA types.

    Reason: schedules, the optimizers and gradient clipping create small tensors with
    ``device="cuda"``; both optimizers sort parameters by the string ``torch.cuda.FloatTensor``.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Redirect the device argument and translate the type name."""
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs = {**kwargs, "device": _CPU}
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return _CUDA_TYPE_NAMES.get(result, result)
        return result


def without_cuda_names() -> contextlib.AbstractContextManager[Any]:
    """Return a context without :class:`CudaNamesMeanCpu`, whose Python call slows down small operators.

    It is for code that names no CUDA device: ours, and Megatron's layers.
    """
    return torch._C.DisableTorchFunction() if _active_mode else contextlib.nullcontext()


@contextlib.contextmanager
def importing_megatron() -> Iterator[None]:
    """Prepare this machine for an import of Megatron-Core, and hide messages about unused packages."""
    if "megatron.core" not in sys.modules:  # its import also imports Transformer Engine
        # Megatron's layers.py relies on this: communication and products start in program order, so that
        # they overlap. CUDA reads it once, when it creates its context: too late after set_device.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        load_cudnn_of_torch(os.environ, Path(torch.__file__).parent.parent)
    with warnings.catch_warnings(), _without_compiler():
        for message in _IMPORT_MESSAGES:
            warnings.filterwarnings("ignore", message=message)
        # Third-party deprecations raised inside Megatron's own import chain are not ours to fix.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=SyntaxWarning)
        yield


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """Without a GPU, leave the small functions of Megatron's modules uncompiled.

    Reason: Megatron decorates them with torch.compile when it is imported. That loads PyTorch's compiler,
    which takes a third of the time of every start. Calling one would need a C++ compiler, which a user's
    machine may not have.
    """
    if torch.cuda.is_available():
        yield
        return

    def as_written(model: Any = None, **options: Any) -> Any:
        return model if model is not None else as_written

    before, torch.compile = torch.compile, as_written
    try:
        yield
    finally:
        torch.compile = before


def load_cudnn_of_torch(environment: MutableMapping[str, str], packages: Path) -> None:
    """Load the cuDNN that came with PyTorch, if one did, before Transformer Engine is imported.

    Reason: Transformer Engine is linked with each of cuDNN's libraries; PyTorch loads most of them only
    when it needs them. So the loader may take the system's cuDNN for Transformer Engine. PyTorch then
    finds it loaded, and calls a cuDNN that it was not built with. Seen on an H200 with 9.14 in the system
    and 9.19 in PyTorch's packages: "cuDNN version incompatibility", then illegal memory accesses.

    Args:
        environment: CUDNN_HOME, where Transformer Engine looks first, is set here; if it already names
            another folder, nothing is loaded.
        packages: folder of installed packages.
    """
    folder = packages / "nvidia" / "cudnn"
    if not folder.is_dir() or find_spec("transformer_engine") is None:
        return
    if environment.setdefault("CUDNN_HOME", str(folder)) == str(folder):
        libraries = folder.glob("lib/libcudnn*.so*")
        for library in sorted(libraries, key=_place_of_cudnn_library):
            # A library that cannot be loaded fails where it is needed; without a GPU nothing needs it.
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(library))


def _place_of_cudnn_library(path: Path) -> int:
    """Return a library's place in the loading order: after those that it is linked with."""
    first = ("libcudnn_graph", "libcudnn_ops")
    name = path.name.split(".")[0]
    return first.index(name) if name in first else len(first)


def silence_megatron_messages() -> None:
    """Keep warnings about Megatron's own calls out of a run's log."""
    for message, category in _RUN_MESSAGES:
        warnings.filterwarnings("ignore", message=message, category=category)


def apply_cpu_patches() -> None:
    """Make Megatron-Core run without a GPU; a second call does nothing."""
    global _active_mode
    if _active_mode is not None:
        return
    _active_mode = CudaNamesMeanCpu()
    _active_mode.__enter__()
    _patch_torch_cuda()
    _patch_random_state()
    _patch_buffers_of_one_rank()


def _patch_torch_cuda() -> None:
    """Answer the ``torch.cuda`` calls that Megatron makes outside any CUDA-only path.

    Reason: p2p communication and buffers pass ``torch.cuda.current_device()`` as a device and call
    ``torch.cuda.synchronize`` after exchanges; 0.19 also touches streams and events.
    """
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment]
    # Each gets its own function object: torch.compile keeps a table of torch's functions by identity.
    for name in ("synchronize", "set_device", "empty_cache"):
        setattr(torch.cuda, name, lambda *args, **kwargs: None)
    for name in ("current_stream", "default_stream"):
        setattr(torch.cuda, name, lambda *args, **kwargs: NoStream())
    torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment]
    torch.cuda.Stream = NoStream  # type: ignore[assignment,misc]
    torch.cuda.Event = NoStream  # type: ignore[assignment,misc]


def _patch_buffers_of_one_rank() -> None:
    """Skip gradient reduction and parameter gathering over a group of one rank.

    Reason: gloo copies the whole gradient buffer twice and the parameter buffer once, onto themselves,
    in every step: 1/20 of the time of a small model's step. NCCL knows that there is nothing to do.
    """
    with importing_megatron():
        from megatron.core.distributed import param_and_grad_buffer
    module: Any = param_and_grad_buffer

    def unless_alone(collective: Any) -> Any:
        def call(output: torch.Tensor, input: torch.Tensor, **kwargs: Any) -> Any:
            is_same = output.data_ptr() == input.data_ptr() and output.numel() == input.numel()
            if is_same and not kwargs.get("async_op") and kwargs["group"].size() == 1:
                return None
            return collective(output, input, **kwargs)

        return call

    for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
        setattr(module, name, unless_alone(getattr(module, name)))


@contextlib.contextmanager
def without_results_manager() -> Iterator[None]:
    """Keep Megatron's checkpoint writer from starting a manager process for its results.

    Reason: that process outlives a killed rank, and its pipe breaks (EOFError) when a write fails.
    checkpoint/strategy.py hands over the results itself.
    """
    with importing_megatron():
        from megatron.core.dist_checkpointing.strategies import filesystem_async
    module: Any = filesystem_async
    before, module._results_queue = module._results_queue, NoStream()
    try:
        yield
    finally:
        module._results_queue = before


class NoStream:
    """Stand-in for a CUDA stream or event. The CPU runs in program order, so there is no need to wait."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _done(self, *args: Any, **kwargs: Any) -> None:
        return None

    wait_stream = wait_event = record_event = synchronize = record = wait = _done

    def query(self) -> bool:
        """Everything issued so far has run."""
        return True


def _patch_random_state() -> None:
    """Let Megatron's per-rank random states drive the CPU generator.

    Reason: the random tracker that gives tensor ranks different dropout masks saves and restores
    the CUDA generator, and activation recomputation does the same. The tracker then warns in each pass
    that the CPU's state has changed.
    """
    with importing_megatron():
        from megatron.core.tensor_parallel import random as megatron_random
    logging.getLogger(megatron_random.__name__).setLevel(logging.ERROR)

    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(new_state)

    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda *args: torch.get_rng_state()  # type: ignore[assignment]
    torch.cuda.set_rng_state = lambda state, *args: torch.set_rng_state(state)  # type: ignore[assignment]
    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state
