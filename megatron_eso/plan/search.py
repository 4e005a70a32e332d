"""Tries every layout of a run on a number of GPUs and ranks those that fit.

A layout is legal if the trainer's own rules (``config.check``) allow it.

``explain`` says why a layout loses to the best: which parts of the step are longer, or how much memory
its fullest stage needs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_eso.config.check import violations
from megatron_eso.config.schema import RunConfig
from megatron_eso.errors import ConfigError
from megatron_eso.plan.hardware import Hardware
from megatron_eso.plan.job import Job
from megatron_eso.plan.memory import stage_memory
from megatron_eso.plan.step_time import StepTime, step_time

MOST_ROWS = 32
"""Largest micro-batch to try, in stack rows; the run's own is tried whatever its size."""
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
        config: the run; its layout is one of those tried.
        num_gpus: GPUs to use, all of them.
        hardware: profile.
        max_context: largest context-parallel size to try.
        allow_fp8: also try FP8 products.

    Raises:
        ConfigError: if there is no legal layout, with the rules that every layout breaks.
    """
    found: list[Candidate] = []
    refused: list[list[str]] = []
    for job in _jobs(config, num_gpus, hardware, max_context, allow_fp8):
        broken = violations(job.config, num_gpus)
        if broken:
            refused.append(broken)
            continue
        memory = max(stage.total for stage in stage_memory(job, hardware))
        found.append(Candidate(job, step_time(job, hardware), memory))
    if not found:
        raise _nothing_legal(config, num_gpus, refused)
    limit = hardware.memory_gb * 1e9
    return sorted(
        found,
        key=lambda c: (
            c.memory_bytes > limit,
            c.time.total if c.memory_bytes <= limit else c.memory_bytes,
        ),
    )


def price(candidate: Candidate, by: str) -> float:
    """Return what a step takes: seconds (``by`` time), or seconds of all GPUs together (cost)."""
    return candidate.time.total * _gpus_counted(candidate, by)


def explain(best: Candidate, other: Candidate, hardware: Hardware, *, by: str = "time") -> str:
    """Return in one line why ``other`` loses to ``best``, by time or by cost."""
    limit = hardware.memory_gb * 1e9
    if other.memory_bytes > limit:
        return f"needs {other.memory_bytes / 1e9:.0f} GB of {hardware.memory_gb:g} GB"
    gpus, best_gpus = _gpus_counted(other, by), _gpus_counted(best, by)
    parts = {n: gpus * getattr(other.time, n) - best_gpus * v for n, v in vars(best.time).items()}
    more = sorted(((d, n) for n, d in parts.items() if d > 0), reverse=True)[:2]
    lost = price(other, by) / price(best, by) - 1
    word, unit = ("dearer", "GPU s") if by == "cost" else ("slower", "s")
    why = ", ".join(f"{n.replace('_', ' ')} +{d:.3g} {unit}" for d, n in more)
    return f"{lost:.1%} {word}: {why}" if why else "equal"


def _gpus_counted(candidate: Candidate, by: str) -> int:
    return candidate.job.num_gpus if by == "cost" else 1


def _nothing_legal(config: RunConfig, num_gpus: int, refused: list[list[str]]) -> ConfigError:
    """Return the error of a search without a legal layout; it names rules that every layout breaks."""
    always = (
        [line for line in refused[0] if all(line in lines for lines in refused)] if refused else []
    )
    if always:
        return ConfigError(
            f"no layout on {num_gpus} GPUs is legal; these settings fit none:\n"
            + "\n".join(f"  - {line}" for line in always)
        )
    return ConfigError(
        f"no layout splits train.global_batch_rows={config.train.global_batch_rows} and "
        f"model.num_layers={config.model.num_layers} over {num_gpus} GPUs; make the batch a multiple of "
        "the number of GPUs, or change that number"
    )


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
        ranks = num_gpus // (tensor * context * pipeline)
        for micro in _micro_batches(config, num_gpus, ranks):
            for recompute in RECOMPUTES:
                for precision in precisions:
                    yield Job(
                        replace(
                            config,
                            parallel=replace(base, recompute=recompute),
                            train=replace(config.train, micro_batch_rows=micro),
                            precision=precision,
                        ),
                        num_gpus,
                    )


def _layouts(
    config: RunConfig, num_gpus: int, hardware: Hardware, max_context: int
) -> list[tuple[int, int, int, int]]:
    """Return (tensor, context, pipeline, virtual pipeline) to try, the run's own among them."""
    parallel, num_layers = config.parallel, config.model.num_layers
    tried = [
        (tensor, context, pipeline, virtual)
        for tensor in _divisors(hardware.gpus_per_node)
        if num_gpus % tensor == 0
        for context in range(1, min(max_context, num_gpus // tensor) + 1)
        if num_gpus % (tensor * context) == 0
        for pipeline in _divisors(num_layers)
        if num_gpus % (tensor * context * pipeline) == 0
        for virtual in (_divisors(num_layers // pipeline) if pipeline > 1 else [1])
    ]
    own = (parallel.tensor, parallel.context, parallel.pipeline, parallel.virtual_pipeline)
    if min(own) > 0 and num_gpus % (own[0] * own[1] * own[2]) == 0 and own not in tried:
        tried.append(own)
    return tried


def _micro_batches(config: RunConfig, num_gpus: int, data_parallel: int) -> list[int]:
    """Return the micro-batch sizes that divide a rank's stack rows, up to a bound, and the run's own."""
    rows, own = Job(config, num_gpus).num_stack_rows / data_parallel, config.train.micro_batch_rows
    tried = {micro for micro in range(1, MOST_ROWS + 1) if rows % micro == 0}
    if own > 0 and rows and rows % own == 0:
        tried.add(own)
    return sorted(tried)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
