"""Megatron's distributed optimizer and gradient buffers around this rank's model chunks."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from megatron_eso.config.schema import OptimizerConfig, ParallelConfig
from megatron_eso.parallel.megatron_patches import importing_megatron
from megatron_eso.parallel.phases import phase

with importing_megatron():
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.fp8_utils import is_float8tensor, post_all_gather_processing
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.transformer.transformer_config import TransformerConfig


def wrap_for_training(
    chunks: list[nn.Module],
    config: TransformerConfig,
    parallel: ParallelConfig,
    clock: "PassClock",
    *,
    on_gpu: bool,
) -> list[nn.Module]:
    """Return the chunks with gradient buffers that the distributed optimizer reduces.

    Gradients are summed, not averaged: the loss is already divided by global counts.
    """
    ddp = buffer_settings(parallel, config, on_gpu=on_gpu)
    config.finalize_model_grads_func = clock
    wrapped = [
        DistributedDataParallel(config, ddp, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    if ddp.overlap_grad_reduce:
        _tell_schedules(config, wrapped)
    return list(wrapped)


def _tell_schedules(config: TransformerConfig, wrapped: list[DistributedDataParallel]) -> None:
    """Let Megatron's schedules say which micro-batch is the last, and when stages reduce and gather.

    Otherwise the gradient buffers go by how often each parameter was ready in the first step.
    """
    several = len(wrapped) > 1
    for name, calls in {
        "no_sync_func": [chunk.no_sync for chunk in wrapped],
        "grad_sync_func": [chunk.start_grad_sync for chunk in wrapped],
        "param_sync_func": [chunk.start_param_sync for chunk in wrapped],
    }.items():
        setattr(config, name, calls if several else calls[0])
    config.overlap_p2p_comm = several  # only the interleaved schedule has this


@contextlib.contextmanager
def whole_weights(chunks: list[nn.Module]) -> Iterator[None]:
    """Keep all parameters gathered inside, so that code may read them, or replace and restore them.

    Otherwise the next forward pass may gather them, which would undo a replacement.
    """
    waiting = [
        chunk
        for chunk in chunks
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather
    ]
    for chunk in waiting:
        chunk.disable_forward_pre_hook(param_sync=True)
    _renew_transposes(waiting)
    try:
        yield
    finally:
        for chunk in waiting:
            chunk.enable_forward_pre_hook()


def buffer_settings(
    parallel: ParallelConfig, config: TransformerConfig, *, on_gpu: bool
) -> DistributedDataParallelConfig:
    """Return Megatron's settings for keeping and exchanging gradients and parameters."""
    overlap = on_gpu if parallel.overlap is None else parallel.overlap
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        # The interleaved schedule gathers a whole chunk at once (`_tell_schedules`).
        align_param_gather=overlap and parallel.virtual_pipeline > 1,
        fp8_param_gather=config.fp8_param,
    )


def optimizer_settings(
    optimizer: OptimizerConfig, config: TransformerConfig
) -> MegatronOptimizerConfig:
    """Return Megatron's optimizer configuration."""
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer.learning_rate,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.eps,
        clip_grad=optimizer.clip_grad_norm,
        bf16=config.bf16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=True,
        fp8_recipe=config.fp8_recipe if config.fp8 else None,
    )


def build_optimizer(
    chunks: list[Any], optimizer: OptimizerConfig, config: TransformerConfig
) -> Any:
    """Return Megatron's optimizer for wrapped chunks."""
    settings = optimizer_settings(optimizer, config)
    built: Any = get_megatron_optimizer(settings, chunks, use_gloo_process_groups=False)
    for group in built.param_groups:
        # Megatron marks norms and biases with wd_mult, and leaves this product to its scheduler.
        group["weight_decay"] = optimizer.weight_decay * group["wd_mult"]
    for inner in built.chained_optimizers:
        _fuse(inner.optimizer)
    return built


def _fuse(optimizer: Any) -> None:
    """Let PyTorch's AdamW update a parameter in one pass over it, where Megatron found no other Adam.

    By default AdamW passes over the memory once for each of a dozen operations. Megatron builds it without
    the switch, which AdamW reads from the parameter groups in every step.
    """
    if type(optimizer) is torch.optim.AdamW:
        for group in optimizer.param_groups:
            group["fused"], group["foreach"] = True, False


def gradient_norm(optimizer: Any) -> float:
    """Prepare the reduced gradients; return their global norm before clipping."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def apply_gradients(optimizer: Any, *, learning_rate: float, max_norm: float, norm: float) -> None:
    """Clip the gradients and take the step; call after :func:`gradient_norm`, which returns ``norm``."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    if 0 < max_norm < norm:
        # Without Apex, Megatron's own clipping makes a scaled copy of every gradient.
        parameters = [x for inner in optimizer.chained_optimizers for x in inner.get_parameters()]
        gradients = [x.grad for x in parameters if x.grad is not None]
        if gradients:  # a rank may hold no part of any parameter
            torch._foreach_mul_(gradients, max_norm / norm)  # type: ignore[attr-defined]
    optimizer.step_with_ready_grads()


def write_fp8_weights(optimizer: Any, chunks: Iterable[Any]) -> None:
    """Round the masters into the weights kept in FP8, as an update does. All ranks must call this.

    Loading does this last: the rounding depends on the scales, which are loaded too.
    """
    wrapped = list(chunks)
    if not _fp8_weights(wrapped):
        return
    for inner in optimizer.chained_optimizers:
        inner._copy_main_params_to_model_params()
    gather_weights(wrapped)


def gather_weights(chunks: list[Any]) -> None:
    """Gather the weights of which each data-parallel rank has written its share. All ranks call this."""
    for chunk in chunks:
        chunk.start_param_sync(force_sync=True)
    _renew_transposes(chunks)


def _renew_transposes(chunks: Iterable[nn.Module]) -> None:
    """Transpose FP8 weights anew: the backward pass reads their transposes.

    Megatron does this only when it waits for a gather under way (0.16.1), not after a forced one.
    """
    found = _fp8_weights(chunks)
    if found:
        post_all_gather_processing(found)


def _fp8_weights(chunks: Iterable[nn.Module]) -> list[nn.Parameter]:
    return [p for chunk in chunks for p in chunk.parameters() if is_float8tensor(p)]


class PassClock:
    """Reduces gradients at the end of the passes, and times this rank's own work until then.

    Time after that includes waiting for other ranks, which hides a slow rank. A GPU's work is timed on the
    GPU: the host issues it long before it is done.
    """

    def __init__(self, *, is_cuda: bool) -> None:
        self._is_cuda = is_cuda
        self._begin = self._end = self._now()

    def start(self) -> None:
        """Start the clock: the rows are there, the passes come next."""
        self._begin = self._now()

    def seconds(self) -> float:
        """Return how long the last passes took, in seconds, once the device has done them."""
        if self._is_cuda:
            return self._begin.elapsed_time(self._end) / 1e3
        return self._end - self._begin

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __call__(
        self,
        model: list[nn.Module],
        num_tokens: Any = None,
        pg_collection: Any = None,
        force_all_reduce: bool | None = False,
    ) -> None:
        """Reduce without Megatron's division by tokens: the loss already has the global counts."""
        self._end = self._now()
        with phase("gradient sum"):
            finalize_model_grads(
                model, None, pg_collection=pg_collection, force_all_reduce=force_all_reduce
            )
