"""A stand-in for CUDA graphs on a CPU: operators are recorded once, then run again on the same memory.

It is at least as strict as a GPU: when a capture ends, its results become NaN; a capture writes nothing
outside its own memory; and an operator that needs a value on the host, or brings one from there,
raises an error.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from tests.replaced import replaced

_FORBIDDEN = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::lift_fresh",
}  # fmt: skip
_made: dict[Any, set[int]] = {}
"""Storages (by address) that captures of a memory pool created; they may write to these."""


class CpuGraph:
    """Takes the place of ``torch.cuda.CUDAGraph``."""

    num_replays = 0

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, list[Any]]] = []

    def register_generator_state(self, state: Any) -> None:
        """Do nothing, because nothing here draws numbers."""

    def reset(self) -> None:
        """Release everything."""
        self.calls.clear()

    def replay(self) -> None:
        """Run the recorded operators."""
        CpuGraph.num_replays += 1
        with torch.no_grad():
            for function, args, kwargs, outputs in self.calls:
                found = function(*args, **kwargs)
                _finish(found)
                for new, old in zip(tree_leaves(found), outputs, strict=True):
                    if isinstance(new, Tensor) and _address(new) != _address(old):
                        old.copy_(new)


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: CpuGraph, made: set[int]) -> None:
        super().__init__()
        self._graph, self._made = graph, made
        self.outputs: list[Tensor] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = function._schema.name, kwargs or {}
        if name in _FORBIDDEN or has_mask_as_index(name, args):
            raise RuntimeError(f"{name} cannot be captured: it needs a value on the host")
        written = _written(function, args, kwargs)
        if name.startswith("aten::") and any(_address(x) not in self._made for x in written):
            found = written[0]  # only recorded: a capture must not write outside its memory
        else:
            found = function(*args, **kwargs)
            _finish(found)
        # Keep aliases, because autograd may change the shape of a tensor object.
        kept = tree_map(_alias, (args, kwargs))
        outputs = [_alias(x) for x in tree_leaves(found)]
        self._graph.calls.append((function, *kept, outputs))
        given = {_address(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        new = [x for x in outputs if isinstance(x, Tensor) and _address(x) not in given]
        self._made.update(map(_address, new))
        self.outputs += new
        return found


def _written(function: Any, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the arguments that an operator modifies."""
    found = []
    for place, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[place] if place < len(args) else kwargs[argument.name])
    return found


def has_mask_as_index(name: str, args: tuple) -> bool:
    """Return whether the size of the result, or of what is read, depends on values.

    Writing a single number where a mask is true does not count: PyTorch fills without looking for places.
    """
    if not name.startswith("aten::index"):
        return False
    if name.startswith("aten::index_put") and args[2].dim() == 0:
        return False
    return any(isinstance(x, Tensor) and x.dtype is torch.bool for x in tree_leaves(args[1:2]))


def _alias(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _finish(found: Any) -> None:
    """Wait for a collective to finish."""
    for x in tree_leaves(found):
        if isinstance(x, torch.ScriptObject):
            dist.Work.unbox(x).wait()


@contextlib.contextmanager
def _capture(
    graph: CpuGraph, *, pool: Any, stream: Any = None, capture_error_mode: str = "global"
) -> Iterator[None]:
    recorder = _Recorder(graph, _made.setdefault(pool, set()))
    with recorder:
        yield
    with torch.no_grad():
        for x in recorder.outputs:
            if x.is_floating_point():
                x.fill_(torch.nan)


@contextlib.contextmanager
def instead_of_cuda_graphs() -> Iterator[None]:
    """Replace the graphs of ``torch.cuda`` with these within the block."""
    wait = dist.Work.wait

    def unrecorded_wait(work: Any, *args: Any) -> Any:
        with _disable_current_modes():  # gloo runs its own operators in it
            return wait(work, *args)

    stand_ins = (
        (torch.cuda, "CUDAGraph", CpuGraph), (torch.cuda, "graph", _capture),
        (torch.cuda, "graph_pool_handle", object), (dist.Work, "wait", unrecorded_wait),
    )  # fmt: skip
    try:
        with replaced(stand_ins):
            yield
    finally:
        _made.clear()
