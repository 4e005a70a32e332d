"""Run micro-batches through Megatron's own schedules, with or without a pipeline."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from megatron_eso.parallel.megatron_patches import importing_megatron

with importing_megatron():
    from megatron.core.pipeline_parallel import get_forward_backward_func

ForwardStep = Callable[[Iterator[Any], nn.Module], tuple[Any, Callable[[Any], Any]]]


def run_micro_batches(
    forward_step: ForwardStep,
    micro_batches: Iterable[Any],
    chunks: list[nn.Module],
    *,
    sequence_length: int,
    stack_rows: int,
    forward_only: bool = False,
) -> list[dict[str, Any]]:
    """Return the loss function's report for each micro-batch; empty except on the last stage.

    Args:
        forward_step: takes an iterator of micro-batches and a model chunk; returns the chunk's output
            and a function of it that returns (loss, number of tokens, report).
        micro_batches: stack rows, all of one shape.
        chunks: model chunks of this rank.
        sequence_length: L, for the pipeline's exchange buffers.
        stack_rows: R, stack rows of a micro-batch, also for these buffers.
        forward_only: no gradients.
    """
    micro_batches = list(micro_batches)
    iterators = [iter(micro_batches) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=sequence_length,
        micro_batch_size=stack_rows,
        forward_only=forward_only,
    )
