"""What generating one row costs: token-forwards, time and cache memory, by objective.

A row of L tokens at NFE network calls costs (Eso-LM paper, figure on latency):
    ar     L calls of 1 token
    eso    with its exact cache, about 2 L token-forwards in total, whatever the NFE
    mdlm   without a cache, L tokens in every call
    bd3lm  one block in every call
Decoding a few tokens at a time is bound by reading weights.
"""

from dataclasses import dataclass

from megatron_eso.config.derive import head_size, num_kv_heads
from megatron_eso.config.schema import RunConfig
from megatron_eso.errors import ConfigError
from megatron_eso.plan.flops import matrix_parameters_per_layer
from megatron_eso.plan.hardware import Hardware
from megatron_eso.plan.parameters import num_parameters


@dataclass(frozen=True)
class SamplingCost:
    """Cost of a batch of rows on one GPU."""

    objective: str
    network_calls: float
    token_forwards: float
    cache_bytes: float
    seconds: float
    bound_by: str


def sampling_costs(
    config: RunConfig, hardware: Hardware, *, length: int, batch: int = 1, calls: int | None = None
) -> list[SamplingCost]:
    """Return the cost for every objective of a model of this shape.

    Args:
        config: model shape, block size and precision.
        hardware: the serving GPU.
        length: tokens of a row.
        batch: rows generated together.
        calls: network calls of the diffusion samplers; None: one per token, as ar always needs.

    Raises:
        ConfigError: for a row without tokens.
    """
    if length < 1:
        raise ConfigError(f"--sampling {length}: a row has at least 1 token")
    number = float(calls or length)
    block = config.objective.block_size
    works = {  # network calls, token-forwards of one row, has a cache
        "ar": (float(length), float(length), True),
        "eso": (number, 2.0 * length, True),
        "bd3lm": (number, number * block, True),
        "mdlm": (number, number * length, False),
    }
    return [
        _cost(name, *work, config=config, hardware=hardware, length=length, batch=batch)
        for name, work in works.items()
    ]


def cache_bytes_per_row(config: RunConfig, length: int) -> float:
    """Return the bytes of one row's keys and values in 16 bits."""
    model = config.model
    return 2.0 * 2.0 * model.num_layers * num_kv_heads(model) * head_size(model) * length


def _cost(
    name: str,
    calls: float,
    token_forwards: float,
    has_cache: bool,
    *,
    config: RunConfig,
    hardware: Hardware,
    length: int,
    batch: int,
) -> SamplingCost:
    model, fitted = config.model, hardware.constants
    cache = cache_bytes_per_row(config, length) * batch if has_cache else 0.0
    # The cache grows evenly, so a call reads half of it on average.
    moved = calls * (2.0 * num_parameters(model) + cache / 2)
    layer = 2.0 * matrix_parameters_per_layer(model)
    attention = 4.0 * head_size(model) * model.num_heads * length * (0.5 if has_cache else 1.0)
    flops = token_forwards * batch * model.num_layers * (layer + attention)
    flops += length * batch * 2.0 * model.hidden_size * model.vocab_size
    reading = moved / (hardware.memory_tb_per_second * 1e12 * fitted.memory_efficiency)
    computing = flops / (hardware.bf16_tflops * 1e12 * fitted.gemm_efficiency)
    launching = calls * model.num_layers * hardware.sampling_layer_seconds
    parts = {"weights and cache": reading, "computation": computing, "launches": launching}
    # Reads overlap with computation. Small kernels do not overlap with each other, so the fixed time of
    # each comes on top (measured, docs/planner.md).
    seconds = max(reading, computing) + launching
    slowest = max(parts, key=lambda part: parts[part])
    return SamplingCost(name, calls, token_forwards * batch, cache, seconds, slowest)
