"""Time of one optimizer step by part, for the slowest pipeline stage.

Every part is a count (operations or bytes) over a peak times a fitted efficiency (see
:class:`megatron_eso.plan.hardware.Constants`). The parts add up to the step.
"""

import math
from dataclasses import dataclass, fields, replace

from megatron_eso.config.derive import ffn_size, head_size, padded_vocab_size
from megatron_eso.plan.flops import matrix_parameters_per_layer
from megatron_eso.plan.hardware import Hardware
from megatron_eso.plan.job import Job
from megatron_eso.plan.memory import local_parameters

BACKWARD_AND_FORWARD = 3.0
# Flash attention recomputes the scores in its backward pass: 5 products against 2 forward.
ATTENTION_BACKWARD_AND_FORWARD = 3.5


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by part; the parts add up to ``total``."""

    gemm: float
    attention: float
    head: float
    elementwise: float
    tensor_parallel: float
    context_parallel: float
    pipeline_transfer: float
    pipeline_bubble: float
    data_parallel: float
    optimizer: float
    launch: float
    straggler: float
    checkpoint: float = 0.0

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return sum(getattr(self, item.name) for item in fields(self))


def step_time(job: Job, hardware: Hardware, *, checkpoint_stall_seconds: float = 0.0) -> StepTime:
    """Return the time of one step.

    Args:
        job: the run on its GPUs.
        hardware: peaks and fitted constants.
        checkpoint_stall_seconds: stall of one save, spread over the steps between two saves.
    """
    parallel = job.config.parallel
    layers, rounds = job.stage_layers, job.num_micro_batches
    layer, head = _layer_parts(job, hardware), _head_seconds(job, hardware)
    layer_seconds = sum(layer.values())
    stages = [n * layer_seconds for n in layers]
    stages[-1] += head
    slowest = max(range(len(stages)), key=stages.__getitem__)
    mean = sum(stages) / len(stages)
    bubble = (parallel.pipeline - 1) / parallel.virtual_pipeline * mean
    parts = {name: rounds * layers[slowest] * value for name, value in layer.items()}
    head_part = rounds * head if slowest == len(stages) - 1 else 0.0
    base = sum(parts.values()) + head_part + bubble
    every = job.config.train.save_every_steps
    return StepTime(
        **parts,
        head=head_part,
        pipeline_transfer=rounds * _transfer_seconds(job, hardware),
        pipeline_bubble=bubble,
        data_parallel=_data_parallel_seconds(job, hardware),
        optimizer=_optimizer_seconds(job, hardware),
        straggler=base * hardware.constants.straggler * _doublings(job, hardware),
        checkpoint=checkpoint_stall_seconds / every if every else 0.0,
    )


def _layer_parts(job: Job, hardware: Hardware) -> dict[str, float]:
    """Return the seconds of one layer for one micro-batch, forward and backward."""
    model, parallel, fitted = job.config.model, job.config.parallel, hardware.constants
    tokens = job.tokens_per_micro_batch
    again = 1.0 if parallel.recompute == "full" else 0.0
    products = 2.0 * matrix_parameters_per_layer(model) * tokens / parallel.tensor
    attention_again = 1.0 if parallel.recompute in ("full", "attention") else 0.0
    scores = _attention_flops(job)
    peak = hardware.bf16_tflops * 1e12
    moved = tokens * (18.0 + 4.0 * ffn_size(model) / model.hidden_size) * model.hidden_size
    moved *= (
        (3.0 + again) / parallel.tensor * (2.0 if job.config.precision.dtype == "fp32" else 1.0)
    )
    return {
        "gemm": products * (BACKWARD_AND_FORWARD + again) / _gemm_speed(job, hardware),
        "attention": scores
        * (ATTENTION_BACKWARD_AND_FORWARD + attention_again)
        / (peak * fitted.attention_efficiency),
        "elementwise": moved / (hardware.memory_tb_per_second * 1e12 * fitted.memory_efficiency),
        "tensor_parallel": _tensor_parallel_seconds(job, hardware) * (1.0 + again / 2.0),
        "context_parallel": _context_parallel_seconds(job, hardware)
        * (1.0 + attention_again / 2.0),
        "launch": fitted.layer_seconds * (1.0 + again / 3.0),
    }


def _attention_flops(job: Job) -> float:
    """Return the forward operations of one layer's attention kernel on one rank."""
    model, train = job.config.model, job.config.train
    width, length = head_size(model) * model.num_heads, train.sequence_length
    share = 1.0 if job.config.objective.name == "mdlm" else 0.5
    return 4.0 * width * length * job.tokens_per_micro_batch * share / job.config.parallel.tensor


def _gemm_speed(job: Job, hardware: Hardware) -> float:
    """Return the operations per second of the layers' products; narrow products are slower."""
    fitted, model = hardware.constants, job.config.model
    width = model.hidden_size / job.config.parallel.tensor
    shape = width / (width + fitted.half_width)
    if job.config.precision.fp8 != "off":
        # FP8 products finish twice as fast, so the same fixed costs weigh double.
        shape = width / (width + 2 * fitted.half_width)
        return hardware.fp8_tflops * 1e12 * fitted.fp8_efficiency * shape
    return hardware.bf16_tflops * 1e12 * fitted.gemm_efficiency * shape


def _head_seconds(job: Job, hardware: Hardware) -> float:
    """Return the head's time for one micro-batch; it stays in 16 bits under FP8."""
    config = job.config
    entries = job.tokens_per_micro_batch * job.head_share
    vocabulary = padded_vocab_size(config.model) / config.parallel.tensor
    plain = replace(job, config=replace(config, precision=replace(config.precision, fp8="off")))
    products = 2.0 * entries * config.model.hidden_size * vocabulary * BACKWARD_AND_FORWARD
    moved = 20.0 * entries * vocabulary  # fp32 logits written, exponentiated, turned into gradients
    fitted = hardware.constants
    return products / _gemm_speed(plain, hardware) + moved / (
        hardware.memory_tb_per_second * 1e12 * fitted.memory_efficiency
    )


def _tensor_parallel_seconds(job: Job, hardware: Hardware) -> float:
    """Return the visible time of 4 all-gathers and 4 reduce-scatters of a layer."""
    size = job.config.parallel.tensor
    volume = 8 * _boundary_bytes(job) * (size - 1) / size
    speed = _link(hardware, size)
    return volume / speed * hardware.constants.tensor_exposed


def _context_parallel_seconds(job: Job, hardware: Hardware) -> float:
    """Return the visible time of swapping tokens for heads and back, forward and backward."""
    parallel, model = job.config.parallel, job.config.model
    if parallel.context == 1:
        return 0.0
    # Queries and outputs; keys and values, of which every context rank gets at least one head.
    kv_width = max(job.kv_width, head_size(model) * parallel.tensor * parallel.context)
    width = 2 * head_size(model) * model.num_heads + 2 * kv_width
    element = 4.0 if job.config.precision.dtype == "fp32" else 2.0
    moved = job.tokens_per_micro_batch * width * element / parallel.tensor
    moved *= (parallel.context - 1) / parallel.context
    speed = _link(hardware, parallel.context * parallel.tensor)
    return 2 * moved / speed * hardware.constants.tensor_exposed


def _transfer_seconds(job: Job, hardware: Hardware) -> float:
    """Return the visible time of passing a micro-batch's activations and gradients between stages."""
    parallel = job.config.parallel
    if parallel.pipeline == 1:
        return 0.0
    per_boundary = 2 * _boundary_bytes(job) / (parallel.tensor if parallel.sequence else 1)
    visible = hardware.constants.network_exposed
    # Megatron numbers all ranks of a stage before those of the next, so two stages share a node only if
    # all do.
    return per_boundary * parallel.virtual_pipeline / _link(hardware, job.num_gpus) * visible


def _data_parallel_seconds(job: Job, hardware: Hardware) -> float:
    """Return the visible time of scattering fp32 gradients and gathering 16-bit weights."""
    parallel = job.config.parallel
    copies = job.data_parallel * parallel.context
    parameters = max(local_parameters(job, s) for s in range(parallel.pipeline))
    element = 4.0 if job.config.precision.dtype == "fp32" else 2.0
    volume = (4.0 + element) * parameters * (copies - 1) / copies
    of_stage = job.num_gpus // parallel.pipeline  # they are neighbors
    return volume / _link(hardware, of_stage) * hardware.constants.network_exposed


def _optimizer_seconds(job: Job, hardware: Hardware) -> float:
    """Return the time to read and write gradients, master weights and two moments of a shard."""
    parallel = job.config.parallel
    parameters = max(local_parameters(job, s) for s in range(parallel.pipeline))
    shard = parameters / (job.data_parallel * parallel.context)
    moved = 30.0 * shard + 8.0 * parameters  # the 8: clearing local gradients and taking their norm
    return moved / (hardware.memory_tb_per_second * 1e12 * hardware.constants.memory_efficiency)


def _boundary_bytes(job: Job) -> float:
    element = 4.0 if job.config.precision.dtype == "fp32" else 2.0
    return job.tokens_per_micro_batch * job.config.model.hidden_size * element


def _link(hardware: Hardware, ranks: int) -> float:
    is_inside = ranks <= hardware.gpus_per_node
    speed = hardware.node_link_gb_per_second if is_inside else hardware.network_gb_per_second
    return speed * 1e9


def _doublings(job: Job, hardware: Hardware) -> float:
    """Return log2 of the number of nodes, so that one node has no stragglers."""
    return math.log2(max(1.0, job.num_gpus / hardware.gpus_per_node))
