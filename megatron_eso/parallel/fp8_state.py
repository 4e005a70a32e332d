"""The scales and histories that FP8 layers carry from step to step, module by module.

Transformer Engine hands them over as a pickle a module (``get_extra_state``). Loading one from a file may
run anything, and newer versions (2.18) refuse to; so what is kept is its content: tensors, numbers and the
recipe's fields, written by ``torch.save`` and read with ``weights_only``. They are the same on all tensor
ranks, and only delayed scaling has any: that of the linear layers, and that of attention.
"""

import importlib
import io
import os
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from megatron_eso.parallel.megatron_patches import quiet_megatron_import

with quiet_megatron_import():
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
    """Yield this rank's modules whose FP8 state a checkpoint must hold; none without delayed scaling."""
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
    """Forget all layers whose scales are updated: their groups are about to be destroyed.

    Transformer Engine reduces what every FP8 layer of a process has noted, over the group that was given
    with it. For a model that is gone the ranks of the next one may not agree to do so, and wait for ever.
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
    """Give a module the state that :func:`get_state` returned."""
    if not state.numel():
        return
    kept = torch.load(io.BytesIO(state.cpu().numpy().tobytes()), weights_only=True)
    recipes: Any = importlib.import_module("transformer_engine.common.recipe")
    known = {field.name for field in fields(recipes.DelayedScaling)}
    settings = {name: value for name, value in kept["recipe"].items() if name in known}
    scaling = recipes.DelayedScaling(fp8_format=recipes.Format[kept["format"]], **settings)
    made = {
        **{name: kept[name] for name in _TENSORS},
        "recipe": scaling,
        "extra_fp8_variables": kept["more"],
    }
    pickled = torch.frombuffer(bytearray(pickle.dumps(made)), dtype=torch.uint8)
    before = os.environ.get(_TRUSTS)
    os.environ[_TRUSTS] = "1"  # a pickle of this process
    try:
        module.set_extra_state(pickled)
    finally:
        if before is None:
            del os.environ[_TRUSTS]
        else:
            os.environ[_TRUSTS] = before


@contextmanager
def by_itself(chunks: Iterable[nn.Module]) -> Iterator[None]:
    """Within it a pass of FP8 layers depends on no other: weights are rounded anew, gradients added.

    In training they are rounded in a step's first micro-batch, which also overwrites gradients; a pass that
    is no step's would take weights of an earlier step, or drop gradients that are there. What is recomputed
    for its backward pass, outside, finds no weights of an earlier step either.
    """
    found: list[Any] = [
        module
        for chunk in chunks
        for module in chunk.modules()
        if hasattr(module, "disable_parameter_transpose_cache")
    ]
    before = [module.disable_parameter_transpose_cache for module in found]
    for module in found:
        # Megatron then tells Transformer Engine of no first micro-batch.
        module.disable_parameter_transpose_cache = True
        module._fp8_workspaces.clear()
    try:
        yield
    finally:
        for module, value in zip(found, before, strict=True):
            module.disable_parameter_transpose_cache = value


@contextmanager
def untouched_histories(chunks: Iterable[nn.Module]) -> Iterator[None]:
    """Within it passes leave no trace in the histories that delayed scales follow.

    A layer notes the largest values it sees in every forward pass, those of an evaluation too; the scales
    of the next step would depend on whether there was one.
    """
    before = [
        (entry.module, None if (found := _history(entry.module)) is None else found.clone())
        for entry in stateful_modules(chunks)
    ]
    try:
        yield
    finally:
        for module, kept in before:
            history = _history(module)
            if history is not None:
                history.zero_() if kept is None else history.copy_(kept)


def _history(module: Any) -> torch.Tensor | None:
    """Return what a module has noted of its forward passes; None if it has not begun, or notes nothing."""
    scaling = getattr(module, "fp8_meta", {}).get("scaling_fwd")
    return getattr(scaling, "amax_history", None)


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)
