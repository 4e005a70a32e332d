"""FP8 state in checkpoints, as layout-free objects ``fp8.NAME``, one a layer and module.

A run without FP8 writes none and passes over what it finds; a run with FP8 that finds none (the
checkpoint was written on a CPU, in bf16, or imported) starts with fresh scales, and says so.
"""

import logging
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_eso.checkpoint.folder import CheckpointFolder
from megatron_eso.errors import CheckpointError
from megatron_eso.parallel.fp8_state import get_state, set_state, stateful_modules
from megatron_eso.parallel.megatron_patches import importing_megatron

with importing_megatron():
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedObject

log = logging.getLogger(__name__)
FP8 = "fp8"


def fp8_objects(chunks: Iterable[nn.Module], *, with_data: bool) -> dict[str, Any]:
    """Return the sharded objects of this rank, to write (with their data) or to load into."""
    replica = (
        0,
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    state: dict[str, Any] = {}
    for entry in stateful_modules(chunks):
        key = f"{FP8}.decoder.layers.{entry.name}"
        data = get_state(entry.module) if with_data else None
        state[f"{key}.{entry.layer}"] = ShardedObject(
            key, data, (entry.num_layers,), (entry.layer,), replica_id=replica
        )
    return state


def load_fp8_state(folder: CheckpointFolder, chunks: list[nn.Module]) -> None:
    """Load the FP8 state of this rank's modules; all ranks must call.

    Raises:
        CheckpointError: if the checkpoint holds the state of some modules and not of others.
    """
    wanted = fp8_objects(chunks, with_data=False)
    if not wanted:
        return
    stored = FileSystemReader(str(folder.path)).read_metadata().state_dict_metadata
    missing = [entry.unique_key for entry in wanted.values() if entry.unique_key not in stored]
    if len(missing) == len(wanted):
        log.warning("%s has no FP8 state: the scales start afresh", folder.path)
        return
    if missing:
        raise CheckpointError(
            f"checkpoint {folder.path} holds FP8 state, but not of {', '.join(missing)}: it was written "
            "with other precision settings (fp8, fp8_attention)"
        )
    modules = {
        f"{FP8}.decoder.layers.{m.name}.{m.layer}": m.module for m in stateful_modules(chunks)
    }
    loaded: Any = dist_checkpointing.load(wanted, str(folder.path))
    for key, module in modules.items():
        set_state(module, loaded[key])
