"""Tries every layout of a run on a number of GPUs and ranks those that fit.

``explain`` says why a layout loses to the best: what part of the step is longer, or which stage's
memory overflows.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_eso.config.derive import ffn_size, num_kv_heads, padded_vocab_size
from megatron_eso.config.schema import RunConfig
from megatron_eso.errors import ConfigError
from megatron_eso.plan.hardware import Hardware
from megatron_eso.plan.job import Job
from megatron_eso.plan.memory import stage_memory
from megatron_eso.plan.step_time import StepTime, step_time

MICRO_BATCHES = (1, 2, 4, 8, 16)
RECOMPUTES = ("none", "attention", "full")


@dataclass(frozen=True)
class Candidate:
    """A layout with its time and the memory of its fullest stage."""

    job: Job
    time: StepTime
    memory_bytes: float

    @property
    def name(self) -> str:
        """The settings that make up the layout, short."""
        parallel, config = self.job.config.parallel, self.job.config
        context = f" cp{parallel.context}" if parallel.context > 1 else ""
        fp8 = " fp8" if config.precision.fp8 != "off" else ""
        return (
            f"tp{parallel.tensor} pp{parallel.pipeline} vp{parallel.virtual_pipeline}{context} "
            f"dp{self.job.data_parallel} micro-batch {config.train.micro_batch_rows} "
            f"recompute {parallel.recompute}{fp8}"
        )

    def settings(self) -> list[str]:
        """Return the ``key=value`` overrides that give this layout."""
        parallel, config = self.job.config.parallel, self.job.config
        return [
            f"parallel.tensor={parallel.tensor}",
            f"parallel.pipeline={parallel.pipeline}",
            f"parallel.virtual_pipeline={parallel.virtual_pipeline}",
            f"parallel.context={parallel.context}",
            f"parallel.recompute={parallel.recompute}",
            f"train.micro_batch_rows={config.train.micro_batch_rows}",
            f"precision.fp8={config.precision.fp8}",
        ]


def search(
    config: RunConfig,
    num_gpus: int,
    hardware: Hardware,
    *,
    max_context: int = 1,
    allow_fp8: bool = False,
) -> list[Candidate]:
    """Return all legal layouts: those that fit by time, then those that overflow by memory.

    Args:
        config: the run; its layout settings are replaced.
        num_gpus: GPUs to use, all of them.
        hardware: profile.
        max_context: largest context-parallel size to try.
        allow_fp8: also try FP8 products.

    Raises:
        ConfigError: if no layout divides the batch and the model.
    """
    found = [
        Candidate(job, step_time(job, hardware), max(s.total for s in stage_memory(job, hardware)))
        for job in _jobs(config, num_gpus, hardware, max_context, allow_fp8)
    ]
    if not found:
        raise ConfigError(
            f"no layout splits train.global_batch_rows={config.train.global_batch_rows} and "
            f"model.num_layers={config.model.num_layers} over {num_gpus} GPUs; change the batch to a "
            "multiple of the GPUs or the number of GPUs"
        )
    limit = hardware.memory_gb * 1e9
    return sorted(
        found,
        key=lambda c: (
            c.memory_bytes > limit,
            c.time.total if c.memory_bytes <= limit else c.memory_bytes,
        ),
    )


def explain(best: Candidate, other: Candidate, hardware: Hardware) -> str:
    """Return in one line why ``other`` loses to ``best``."""
    limit = hardware.memory_gb * 1e9
    if other.memory_bytes > limit:
        return f"needs {other.memory_bytes / 1e9:.0f} GB of {hardware.memory_gb:g} GB"
    parts = {n: getattr(other.time, n) - v for n, v in vars(best.time).items()}
    slower = sorted(((d, n) for n, d in parts.items() if d > 0), reverse=True)[:2]
    lost = other.time.total / best.time.total - 1
    why = ", ".join(f"{n.replace('_', ' ')} +{d:.3g} s" for d, n in slower)
    return f"{lost:.1%} slower: {why}" if why else "equal"


def _jobs(
    config: RunConfig, num_gpus: int, hardware: Hardware, max_context: int, allow_fp8: bool
) -> Iterator[Job]:
    precisions = [config.precision]
    if allow_fp8 and hardware.fp8_tflops and config.precision.fp8 == "off":
        precisions.append(replace(config.precision, fp8="tensorwise"))
    for tensor, context, pipeline, virtual in _layouts(config, num_gpus, hardware, max_context):
        base = replace(
            config.parallel,
            tensor=tensor,
            context=context,
            pipeline=pipeline,
            virtual_pipeline=virtual,
        )
        for micro in MICRO_BATCHES:
            for recompute in RECOMPUTES:
                for precision in precisions:
                    job = Job(
                        replace(
                            config,
                            parallel=replace(base, recompute=recompute),
                            train=replace(config.train, micro_batch_rows=micro),
                            precision=precision,
                        ),
                        num_gpus,
                    )
                    if _is_legal(job):
                        yield job


def _layouts(
    config: RunConfig, num_gpus: int, hardware: Hardware, max_context: int
) -> Iterator[tuple[int, int, int, int]]:
    model = config.model
    widths = (model.num_heads, num_kv_heads(model), ffn_size(model), padded_vocab_size(model))
    for tensor in _divisors(min(num_gpus, hardware.gpus_per_node)):
        if num_gpus % tensor or any(width % tensor for width in widths):
            continue
        for context in _divisors(max_context):
            if not _context_shares_heads(config, tensor, context):
                continue
            for pipeline in _divisors(model.num_layers):
                if num_gpus % (tensor * context * pipeline):
                    continue
                for virtual in _divisors(model.num_layers // pipeline) if pipeline > 1 else [1]:
                    yield tensor, context, pipeline, virtual


def _context_shares_heads(config: RunConfig, tensor: int, context: int) -> bool:
    """Return whether ``config.check`` allows the heads of a tensor rank on context ranks."""
    ranks, kv_heads = tensor * context, num_kv_heads(config.model)
    if context == 1:
        return True
    return config.model.num_heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)


def _is_legal(job: Job) -> bool:
    train, parallel = job.config.train, job.config.parallel
    rounds = job.num_micro_batches
    if rounds < 1 or rounds != int(rounds):
        return False
    if job.stack_rows_per_row > 1 and train.micro_batch_rows % 2:
        return False
    shares = parallel.context * (parallel.tensor if parallel.sequence else 1)
    if train.sequence_length % shares:
        return False
    return parallel.virtual_pipeline == 1 or int(rounds) % parallel.pipeline == 0


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
