"""FP8 state in checkpoints, as layout-free objects ``fp8.NAME``, one per layer and module.

A run without FP8 writes none and ignores what it finds. A run with FP8 that finds none (the checkpoint
was written on a CPU or in bf16, or was imported) starts with fresh scales and says so.
"""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from megatron_eso.checkpoint.torch_dist import TorchDistReader
from megatron_eso.errors import CheckpointError
from megatron_eso.parallel.exchange import any_rank, together
from megatron_eso.parallel.fp8_state import Stateful, get_state, set_state, stateful_modules
from megatron_eso.parallel.megatron_patches import importing_megatron

with importing_megatron():
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedObject

log = logging.getLogger(__name__)
FP8 = "fp8"


def fp8_objects(chunks: Iterable[nn.Module]) -> dict[str, Any]:
    """Return this rank's FP8 state as sharded objects."""
    replica = (
        0,
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    state: dict[str, Any] = {}
    for entry in stateful_modules(chunks):
        made = _object(entry, get_state(entry.module), replica)
        state[f"{made.key}.{entry.layer}"] = made
    return state


def _object(entry: Stateful, data: torch.Tensor | None, replica: Any = 0) -> ShardedObject:
    return ShardedObject(
        f"{FP8}.decoder.layers.{entry.name}",
        data,
        (entry.num_layers,),
        (entry.layer,),
        replica_id=replica,
    )


def load_fp8_state(reader: TorchDistReader, chunks: list[nn.Module], device: torch.device) -> None:
    """Load the FP8 state of this rank's modules. All ranks must call this.

    Raises:
        CheckpointError: on all ranks, if the checkpoint holds the state of some modules but not of others,
            or a state that cannot be read.
    """
    wanted = {_object(entry, None).unique_key: entry.module for entry in stateful_modules(chunks)}
    missing = [name for name in wanted if name not in reader.objects]
    is_wanted, is_stored = any_rank([bool(wanted), len(missing) < len(wanted)], device)
    if not is_stored:
        if is_wanted:
            log.warning("%s has no FP8 state: the scales start afresh", reader.folder)
        return

    def load() -> None:
        if missing:
            raise CheckpointError(
                f"checkpoint {reader.folder} holds FP8 state, but not of {', '.join(missing)}: it was "
                "written with other precision settings (fp8, fp8_attention)"
            )
        for name, module in wanted.items():
            try:
                set_state(module, reader.read_object(name))
            except ValueError as error:
                raise CheckpointError(f"{reader.folder}: {name} is damaged: {error}") from None

    together(load, device, CheckpointError)
