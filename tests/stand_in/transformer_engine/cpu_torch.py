"""PyTorch as Transformer Engine's modules see it here: an H100 whose memory is the host's."""

import sys
from contextlib import nullcontext
from typing import Any

import torch

DEVICE = torch.device("cpu")
_GARBAGE = 12345.0
"""What memory holds that nothing has been written to: a large number, which a test would notice."""
_FACTORIES = (
    "arange", "empty", "empty_like", "full", "full_like", "ones", "ones_like", "rand", "randn",
    "tensor", "zeros", "zeros_like",
)  # fmt: skip


def take_the_place_of_torch() -> None:
    """Give every module of Transformer Engine that is imported this PyTorch under its name."""
    stand_in = _Torch()
    for name, module in list(sys.modules.items()):
        if name.startswith("transformer_engine.pytorch") and vars(module).get("torch") is torch:
            module.torch = stand_in  # type: ignore[attr-defined]
        if name == "transformer_engine.pytorch.distributed":  # it has these by name
            module._lazy_init, module._lazy_call = lambda: None, lambda call: call()  # type: ignore[attr-defined]


class _Seen:
    """Another module's names, but for those of a subclass."""

    _behind: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self._behind, name)


class _Properties:
    major, minor, multi_processor_count, total_memory = 9, 0, 132, 80 * 2**30
    name = "NVIDIA H100"


class _Nvtx:
    @staticmethod
    def range(*_: Any, **__: Any) -> Any:
        return nullcontext()


class _Generators:
    def __getitem__(self, _: Any) -> torch.Generator:
        return torch.default_generator


class _Cuda(_Seen):
    _behind = torch.cuda
    nvtx = _Nvtx()
    default_generators = _Generators()

    def is_available(self) -> bool:
        return True

    def current_device(self) -> torch.device:
        return DEVICE

    def get_device_properties(self, *_: Any) -> _Properties:
        return _Properties()

    def get_device_capability(self, *_: Any) -> tuple[int, int]:
        return 9, 0

    def synchronize(self, *_: Any) -> None:
        pass

    def device(self, *_: Any) -> Any:
        return nullcontext()

    def stream(self, *_: Any) -> Any:
        return nullcontext()

    def current_stream(self, *_: Any) -> None:
        return None

    def is_current_stream_capturing(self) -> bool:
        return False


class _Distributed(_Seen):
    _behind = torch.distributed

    def new_group(self, *args: Any, backend: Any = None, **settings: Any) -> Any:
        return torch.distributed.new_group(*args, **settings)

    def new_subgroups_by_enumeration(self, ranks: Any, backend: Any = None) -> Any:
        return torch.distributed.new_subgroups_by_enumeration(ranks)

    def is_backend_available(self, backend: str) -> bool:
        return True


class _Device(type):
    """``torch.device``: made with "cuda" it is the CPU; asked for a type, the real one answers."""

    def __call__(cls, kind: Any = None, *index: Any) -> Any:
        return DEVICE if str(kind).startswith("cuda") else torch.device(kind, *index)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, torch.device)


class _DeviceOnCpu(metaclass=_Device):
    pass


class _Torch(_Seen):
    _behind = torch
    cuda = _Cuda()
    distributed = _Distributed()
    device = _DeviceOnCpu

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        if name not in _FACTORIES:
            return found

        def on_cpu(*args: Any, **settings: Any) -> Any:
            if settings.get("device") is not None:
                settings["device"] = _DeviceOnCpu(settings["device"])
            made = found(*args, **settings)
            if name.startswith("empty") and made.is_floating_point() and made.device == DEVICE:
                with torch.no_grad():
                    made.fill_(_GARBAGE)
            return made

        return on_cpu
