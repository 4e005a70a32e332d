"""Transformer Engine's user buffers: tensor ranks exchange pieces while other pieces are multiplied.

The buffers keep one shape, [L R / C, H], for the life of the process. Every micro-batch of a step has it,
and an evaluation fills up its micro-batches to it (eval/evaluate.py). Letters: L = tokens in a row,
R = stack rows of a micro-batch, C = context ranks, H = hidden size.
"""

import importlib
from typing import Any

from megatron_eso.config import derive
from megatron_eso.config.schema import RunConfig
from megatron_eso.errors import ConfigError


def start_user_buffers(config: RunConfig) -> None:
    """Allocate the buffers of a run with ``parallel.tensor_overlap``; call before its layers are built.

    Raises:
        ConfigError: with Transformer Engine's message, if this machine cannot have them.
    """
    parallel, precision = config.parallel, config.precision
    if not derive.has_user_buffers(parallel, precision):
        return
    base: Any = importlib.import_module("transformer_engine.pytorch.module.base")
    tokens = config.train.sequence_length * config.train.micro_batch_rows // parallel.context
    shape = [tokens, config.model.hidden_size]
    base.destroy_ub()  # those of an earlier session of this process, if there was one
    modes = base.UserBufferQuantizationMode
    quantization = [modes.NONE if precision.fp8 == "off" else modes.FP8]
    if precision.bf16_first_layers + precision.bf16_last_layers > 0:
        quantization.append(modes.NONE)
    try:
        base.initialize_ub(
            shape=shape,
            tp_size=parallel.tensor,
            quantization_modes=quantization,
            bootstrap_backend="nccl",  # always available here; the default may be MPI
        )
    except (AssertionError, RuntimeError) as error:
        raise ConfigError(
            f"parallel.tensor_overlap=true: Transformer Engine has no user buffers of {shape[0]} tokens x "
            f"{shape[1]} for {parallel.tensor} tensor ranks here ({error}); set it to false"
        ) from error
