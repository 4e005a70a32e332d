"""Saving in Megatron's torch_dist format, in three parts that fail separately: plan, write, publish.

Megatron's own saving writes common.pt while it plans, and its metadata between two collectives, so an
error on one rank leaves the others waiting. It also sends results through a manager process that
outlives a killed rank. Here planning touches no file, writing runs anywhere (a forked process, say),
and one rank publishes. The files are the same. Plans are made once and kept.
"""

import inspect
import queue
from pathlib import Path
from typing import Any

import torch

from megatron_eso.checkpoint.folder import hash_file
from megatron_eso.parallel.megatron_patches import importing_megatron, without_results_manager

with importing_megatron():
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

Files = dict[str, dict[str, Any]]
"""Name -> size and hash, for the files that a rank wrote."""

# From 0.19 on, Megatron uses nvidia-resiliency-ext's writer unless told to use its own.
_OWN_WRITER: dict[str, Any] = (
    {"async_strategy": "mcore"}
    if "async_strategy" in inspect.signature(TorchDistSaveShardedStrategy.async_save).parameters
    else {}
)


class Plan:
    """What one rank writes for one checkpoint."""

    def __init__(self, writer: FileSystemWriterAsync, metadata: Any) -> None:
        self._writer, self._metadata = writer, metadata
        # Non-blocking copies from a GPU use pinned memory: a forked writer may crash there
        # (Megatron-LM issue 1861), and PyTorch keeps up to twice as much of it forever.
        self._buckets = FileSystemWriterAsync.preload_tensors(
            writer.write_buckets or [], non_blocking=False
        )

    def write(self) -> tuple[list[Any], Files]:
        """Write this rank's files; return Megatron's write results and what was written."""
        results, files = [], {}
        transforms = [self._writer.transforms] if hasattr(self._writer, "transforms") else []
        for index, bucket in enumerate(self._buckets):
            answer: Any = queue.SimpleQueue()
            counter: Any = queue.Queue()
            counter.put(index)
            FileSystemWriterAsync.write_preloaded_data(
                transforms, index, bucket, answer, counter, use_fsync=True
            )
            _, outcome = answer.get()
            if isinstance(outcome, Exception):
                raise outcome
            results += outcome
            path = Path(bucket[0])
            # The file is read back from the page cache, in this process: hashing never stalls training.
            files[path.name] = {"bytes": path.stat().st_size, "xxh3_128": hash_file(path)}
        return results, files

    def publish(self, folder: Path, results: list[list[Any]]) -> None:
        """Write the small files that turn a folder of shards into a checkpoint; rank 0 only."""
        torch.save({}, folder / "common.pt")
        self._writer.finish(self._metadata, results)
        save_config(CheckpointingConfig("torch_dist", 1), str(folder))


class Planner:
    """Makes plans; keeps what does not change between the checkpoints of a run."""

    def __init__(self) -> None:
        self._strategy = _PlanOnly("torch_dist", 1, cached_metadata=True)
        self._is_checked = False

    def plan(self, state: dict[str, Any], folder: Path) -> Plan:
        """Return what this rank writes of a sharded state. All ranks must call this."""
        # Whether every part of every tensor has one writer is checked once: it cannot change.
        sharded: Any
        sharded, _ = save_preprocess(state, validate_access_integrity=not self._is_checked)
        self._is_checked = True
        with without_results_manager():
            self._strategy.async_save(sharded, folder, **_OWN_WRITER)
        return Plan(*self._strategy.planned)


class _PlanOnly(TorchDistSaveShardedStrategy):
    """Stops after planning: instead of making Megatron's callbacks, the hook keeps their ingredients."""

    planned: tuple[FileSystemWriterAsync, Any]

    def _get_save_and_finalize_callbacks(
        self, writer: Any, save_state_dict_ret: Any, async_strategy: str = "mcore"
    ) -> Any:
        self.planned = writer, save_state_dict_ret[1]
        return AsyncRequest(None, (), [])
