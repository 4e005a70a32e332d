"""The scales and histories that FP8 layers carry from step to step, module by module.

Transformer Engine gives them as one pickle per module (``get_extra_state``). Loading a pickle from a file
may run anything, and newer versions (2.18) refuse to. So checkpoints keep its content instead: tensors,
numbers and the recipe's fields, written by ``torch.save`` and read with ``weights_only``. They are the same
on all tensor ranks. Only delayed scaling has such state, in the linear layers and in attention.
"""

import importlib
import io
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from megatron_eso.parallel.megatron_patches import importing_megatron

with importing_megatron():
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.extensions import transformer_engine as megatron_te


_TENSORS = ("scale_fwd", "amax_history_fwd", "scale_bwd", "amax_history_bwd")
_TRUSTS = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


@dataclass(frozen=True)
class Stateful:
    """A module with FP8 state."""

    name: str
    """Path within its layer."""
    layer: int
    """Number of the layer over all stages, from 0."""
    num_layers: int
    """Layers of the model."""
    module: nn.Module


def stateful_modules(chunks: Iterable[nn.Module]) -> Iterator[Stateful]:
    """Yield this rank's modules with FP8 state for the checkpoint; none without delayed scaling."""
    for chunk in chunks:
        model: Any = chunk.module if isinstance(chunk, DistributedDataParallel) else chunk
        config = model.config
        has_state = config.fp8 and (
            config.fp8_recipe == "delayed" or config.fp8_dot_product_attention
        )
        for layer in model.decoder.layers if has_state else ():
            for name, module in layer.named_modules():
                if type(module).get_extra_state is not nn.Module.get_extra_state:
                    yield Stateful(name, layer.layer_number - 1, config.num_layers, module)


def forget_layers() -> None:
    """Make Transformer Engine forget all FP8 layers: their groups are about to be destroyed.

    It reduces what every FP8 layer of the process has recorded, over the group given with the layer. For
    layers of a model that is gone, the next model's ranks may not all do so, and would wait forever.
    """
    if megatron_te.HAVE_TE:
        megatron_te.FP8GlobalStateManager.reset()


def get_state(module: nn.Module) -> torch.Tensor:
    """Return a module's FP8 state as bytes on the CPU; empty if it has none (yet)."""
    given: Any = module.get_extra_state()
    if given is None or (isinstance(given, torch.Tensor) and not given.numel()):
        return torch.empty(0, dtype=torch.uint8)
    if not isinstance(given, torch.Tensor):
        raise TypeError(
            f"{type(module).__name__} gives its FP8 state as {type(given).__name__}, not as a tensor of "
            "bytes: this version of Transformer Engine is not known (docs/gpu.md)"
        )
    found = pickle.loads(given.cpu().numpy().tobytes())  # written by this process, just now
    if not all(name in found for name in _TENSORS):
        return torch.empty(0, dtype=torch.uint8)
    recipe, more = found["recipe"], found["extra_fp8_variables"]
    settings = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
    kept = {
        **{name: found[name] for name in _TENSORS},
        "format": recipe.fp8_format.name,
        "recipe": {name: value for name, value in settings.items() if _is_plain(value)},
        "more": {name: value for name, value in more.items() if _is_plain(value)},
    }
    file = io.BytesIO()
    torch.save(kept, file)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def set_state(module: nn.Module, state: torch.Tensor) -> None:
    """Restore a module's FP8 state from what :func:`get_state` returned.

    Raises:
        ValueError: if ``state`` is anything else.
    """
    if not state.numel():
        return
    pickled = torch.frombuffer(bytearray(pickle.dumps(_made_of(state))), dtype=torch.uint8)
    before = os.environ.get(_TRUSTS)
    os.environ[_TRUSTS] = "1"  # safe: this process made the pickle
    try:
        module.set_extra_state(pickled)
    finally:
        if before is None:
            del os.environ[_TRUSTS]
        else:
            os.environ[_TRUSTS] = before


def _made_of(state: torch.Tensor) -> dict[str, Any]:
    """Return what Transformer Engine would have pickled, rebuilt from plain values only."""
    recipes: Any = importlib.import_module("transformer_engine.common.recipe")
    known = {field.name for field in fields(recipes.DelayedScaling)}
    try:
        kept = torch.load(io.BytesIO(state.cpu().numpy().tobytes()), weights_only=True)
        tensors = {name: kept[name] for name in _TENSORS}
        more = {name: value for name, value in kept["more"].items() if _is_plain(value)}
        settings = {name: value for name, value in kept["recipe"].items() if name in known}
        scaling = recipes.DelayedScaling(fp8_format=recipes.Format[kept["format"]], **settings)
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    return {**tensors, "recipe": scaling, "extra_fp8_variables": more}


@contextmanager
def by_itself(chunks: Iterable[nn.Module]) -> Iterator[None]:
    """Make FP8 passes inside independent of all others: weights are rounded anew, gradients are added.

    In training, a step's first micro-batch rounds the weights and overwrites gradients. A pass outside a
    step would use an earlier step's rounded weights, or drop existing gradients. These weights are removed
    here, so a recomputation for the backward pass, outside this context, does not find them either.
    """
    found: list[Any] = [
        module
        for chunk in chunks
        for module in chunk.modules()
        if hasattr(module, "disable_parameter_transpose_cache")
    ]
    before = [module.disable_parameter_transpose_cache for module in found]
    for module in found:
        # Megatron then never tells Transformer Engine that a micro-batch is the first.
        module.disable_parameter_transpose_cache = True
        module._fp8_workspaces.clear()
    try:
        yield
    finally:
        for module, value in zip(found, before, strict=True):
            module.disable_parameter_transpose_cache = value


def kept_scales(chunks: Iterable[nn.Module]) -> Callable[[], None]:
    """Return a function that undoes what passes do to delayed scales and their histories.

    A layer records the largest values of every pass and then updates its scales from them, also in an
    evaluation and in a step that is not applied.
    """
    modules = [entry.module for entry in stateful_modules(chunks)]
    live = [_scaling(module) for module in modules]
    flat = [x for tensors in live for x in tensors]
    kept = [torch.empty_like(x) for x in flat]
    if flat:
        torch.ops.aten._foreach_copy_(kept, flat)

    @torch.no_grad()
    def undo() -> None:
        if flat:
            torch.ops.aten._foreach_copy_(flat, kept)
        for module, before in zip(modules, live, strict=True):
            for x in () if before else _scaling(module):  # its state was created since
                x.fill_(1.0 if x.dim() == 1 else 0.0)

    return undo


@contextmanager
def untouched_scales(chunks: Iterable[nn.Module]) -> Iterator[None]:
    """Make passes inside leave no trace in delayed scales."""
    undo = kept_scales(chunks)
    try:
        yield
    finally:
        undo()


def _scaling(module: Any) -> list[torch.Tensor]:
    """Return a module's scales [n] and histories [steps, n]; empty if it has none (yet)."""
    found = []
    for name in ("scaling_fwd", "scaling_bwd"):
        scaling: Any = getattr(module, "fp8_meta", {}).get(name)
        if getattr(scaling, "amax_history", None) is not None:
            found += [scaling.scale, scaling.amax_history]
    return found


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)
