"""Memory of every pipeline stage by kind, in bytes per GPU.

Formulas: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models"
(activations); Megatron-Core's distributed optimizer (states: 6 + 12 / d bytes per weight in bf16, 8 + 8 / d
in fp32, whose weights are their own masters).
"""

from dataclasses import dataclass, fields

from megatron_eso.config.derive import ffn_size, padded_vocab_size
from megatron_eso.plan.flops import matrix_parameters_per_layer
from megatron_eso.plan.hardware import Hardware
from megatron_eso.plan.job import Job
from megatron_eso.plan.parameters import embedding_parameters, head_parameters, layer_parameters

CHUNK_LOGITS = 2**27
"""Logits that `parallel/vocabulary_loss.py` makes at a time on a GPU."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one GPU of a pipeline stage."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    workspace: float

    @property
    def total(self) -> float:
        """Sum of all kinds."""
        return sum(getattr(self, item.name) for item in fields(self))


def stage_memory(job: Job, hardware: Hardware) -> list[StageMemory]:
    """Return the memory of each pipeline stage, first to last."""
    return [_one_stage(job, hardware, stage) for stage in range(job.config.parallel.pipeline)]


def local_parameters(job: Job, stage: int) -> float:
    """Return the weights one GPU of a stage holds."""
    model, parallel = job.config.model, job.config.parallel
    count = job.stage_layers[stage] * layer_parameters(model)
    is_last = stage == parallel.pipeline - 1
    if stage == 0:
        count += embedding_parameters(model)
    if is_last:
        count += head_parameters(model)
        if model.tie_embeddings and stage > 0:  # the last stage keeps its own copy
            count += embedding_parameters(model)
    return count / parallel.tensor


def layer_activation_bytes(job: Job) -> float:
    """Return the bytes that one layer keeps of one micro-batch.

    For 16-bit activations, sequence parallelism and a fused attention kernel these are
    s b h (18 + 4 f / h) / t (34 s b h / t at f = 4 h). Without sequence parallelism the norms' inputs
    and residuals (10 s b h) are not split.
    """
    model, parallel = job.config.model, job.config.parallel
    elements = job.tokens_per_micro_batch * model.hidden_size
    # A gated MLP keeps both factors and their product.
    kept_by_mlp = (6.0 if model.activation == "swiglu" else 4.0) * ffn_size(model)
    # 4 of the 18 are keys and values; grouped heads keep fewer.
    full = 14.0 + 4.0 * job.kv_width / model.hidden_size + kept_by_mlp / model.hidden_size
    whole = 0.0 if parallel.sequence or parallel.tensor == 1 else 10.0
    if parallel.recompute == "attention":
        full -= 2.0  # the kernel's output
    return elements * (whole + (full - whole) / parallel.tensor) * _element_bytes(job) / 2


def _one_stage(job: Job, hardware: Hardware, stage: int) -> StageMemory:
    config = job.config
    parameters, copies = local_parameters(job, stage), job.data_parallel * config.parallel.context
    weights = parameters * _element_bytes(job) + _fp8_copies(job, stage)
    masters = 0.0 if config.precision.dtype == "fp32" else 4.0
    average = 4.0 if config.optimizer.ema_decay else 0.0
    return StageMemory(
        weights=weights,
        gradients=4.0 * parameters,
        optimizer=(masters + 8.0 + average) * parameters / copies,
        activations=_activations(job, stage),
        logits=_logits(job) if stage == config.parallel.pipeline - 1 else 0.0,
        workspace=hardware.workspace_gb * 1e9,
    )


def _fp8_copies(job: Job, stage: int) -> float:
    """Return the bytes of FP8 weights that are kept beside the 16-bit ones.

    Transformer Engine casts a layer's matrices once a step and keeps the FP8 copy and its transpose
    between micro-batches. With ``fp8_params`` only these two exist: as much as one 16-bit weight.
    """
    precision, stages = job.config.precision, job.config.parallel.pipeline
    if precision.fp8 == "off" or precision.fp8_params:
        return 0.0
    layers = job.stage_layers[stage]
    layers -= precision.bf16_first_layers if stage == 0 else 0
    layers -= precision.bf16_last_layers if stage == stages - 1 else 0
    return 2.0 * layers * matrix_parameters_per_layer(job.config.model) / job.config.parallel.tensor


def _activations(job: Job, stage: int) -> float:
    model, parallel = job.config.model, job.config.parallel
    layers, layer = job.stage_layers[stage], layer_activation_bytes(job)
    stages, chunks = parallel.pipeline, parallel.virtual_pipeline
    in_flight = min(job.num_micro_batches, stages - stage)  # 1F1B: the first stage holds most
    if chunks > 1:  # interleaved: (2 (p - r - 1) + (v - 1) p + 1) chunks of 1 / v of the layers
        held = 2 * (stages - stage - 1) + (chunks - 1) * stages + 1
        in_flight = min(job.num_micro_batches, held / chunks)
    boundary = job.tokens_per_micro_batch * model.hidden_size * _element_bytes(job)
    boundary /= parallel.tensor if parallel.sequence else 1
    if parallel.recompute == "full":
        return layers * boundary * in_flight + layer
    # Graphs of a second kind of micro-batch also keep their layers' outputs; they share the rest.
    kept_by_graphs = layers * boundary * in_flight if parallel.cuda_graphs else 0.0
    return layers * layer * in_flight + boundary + kept_by_graphs


def _logits(job: Job) -> float:
    """Return what the head holds on the last stage: a chunk of logits and its weight's fp32 gradient.

    The logits are fp32, with two 16-bit copies if the run is in 16 bits.
    """
    width = padded_vocab_size(job.config.model) / job.config.parallel.tensor
    entries = min(job.tokens_per_micro_batch * job.head_share, CHUNK_LOGITS / width)
    copies = 4.0 if job.config.precision.dtype == "fp32" else 8.0
    return (copies * entries + 4.0 * job.config.model.hidden_size) * width


def _element_bytes(job: Job) -> float:
    return 4.0 if job.config.precision.dtype == "fp32" else 2.0
