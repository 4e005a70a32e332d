"""The whole plan of a run on a cluster: memory, time, speed, cost, and warnings with what to change."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_eso.config.derive import head_size, padded_vocab_size, total_steps
from megatron_eso.plan.flops import Flops, model_flops_per_step
from megatron_eso.plan.goodput import Failures, best_interval, expected_share
from megatron_eso.plan.hardware import Hardware
from megatron_eso.plan.job import Job, require_placeable
from megatron_eso.plan.memory import StageMemory, stage_memory
from megatron_eso.plan.parameters import checkpoint_bytes, num_parameters
from megatron_eso.plan.step_time import StepTime, step_time

COLUMNS = 128
"""Matrix kernels work on tiles of this many columns; a partial tile costs as much as a whole one."""
WORTH_SAYING = 0.01
"""Share of the time that another save interval must win back to be worth a warning."""


@dataclass(frozen=True)
class Plan:
    """What a run needs and gives."""

    job: Job
    hardware: Hardware
    memory: list[StageMemory]
    time: StepTime
    flops: Flops
    failures: Failures
    goodput: float
    warnings: list[str]

    @property
    def tokens_per_second(self) -> float:
        """Data tokens per second over all GPUs."""
        train = self.job.config.train
        return train.global_batch_rows * train.sequence_length / self.time.total

    @property
    def mfu(self) -> float:
        """Share of the 16-bit peak, causal attention counted as computed (NeMo's convention)."""
        return self.flops.training / self.time.total / self._peak

    @property
    def mfu_full_attention(self) -> float:
        """The same share with every pair of a row counted (Megatron's convention)."""
        return self.flops.training_full_attention / self.time.total / self._peak

    @property
    def days(self) -> float:
        """Wall time to the run's token budget, failures included."""
        training = self.time.total - self.time.checkpoint  # goodput counts the stalls of saves
        return total_steps(self.job.config) * training / 86400 / self.goodput

    @property
    def dollars(self) -> float:
        """Price of all GPUs for that time."""
        return self.days * 24 * self.job.num_gpus * self.hardware.dollars_per_gpu_hour

    @property
    def _peak(self) -> float:
        return self.hardware.bf16_tflops * 1e12 * self.job.num_gpus

    def as_dict(self) -> dict[str, Any]:
        """Return all figures for programs: bytes, seconds, shares."""
        return {
            "run": self.job.config.name,
            "num_gpus": self.job.num_gpus,
            "hardware": self.hardware.name,
            "parallel": asdict(self.job.config.parallel),
            "num_parameters": num_parameters(self.job.config.model),
            "memory_bytes": [asdict(stage) | {"total": stage.total} for stage in self.memory],
            "step_seconds": asdict(self.time) | {"total": self.time.total},
            "tokens_per_second": self.tokens_per_second,
            "model_flops_per_step": asdict(self.flops) | {"training": self.flops.training},
            "mfu": self.mfu,
            "mfu_full_attention": self.mfu_full_attention,
            "save_interval_seconds": self.failures.interval_seconds,
            "goodput": self.goodput,
            "days": self.days,
            "dollars": self.dollars,
            "warnings": self.warnings,
        }


def make_plan(job: Job, hardware: Hardware, *, failures: Failures | None = None) -> Plan:
    """Return the plan of a job.

    Args:
        job: the run on its GPUs.
        hardware: profile.
        failures: what fails; None: as in :func:`run_failures`.

    Raises:
        ConfigError: if ranks, rows or layers do not divide.
    """
    require_placeable(job)
    config = job.config
    step_seconds = step_time(job, hardware).total
    failures = failures or run_failures(job, hardware, step_seconds)
    memory = stage_memory(job, hardware)
    return Plan(
        job=job,
        hardware=hardware,
        memory=memory,
        time=step_time(job, hardware, checkpoint_stall_seconds=failures.save_stall_seconds),
        flops=model_flops_per_step(
            config.model,
            config.objective,
            sequence_length=config.train.sequence_length,
            rows=config.train.global_batch_rows,
        ),
        failures=failures,
        goodput=expected_share(failures),
        warnings=[
            *_warnings(job, hardware, memory),
            *_interval_warnings(job, failures, step_seconds),
        ],
    )


def run_failures(job: Job, hardware: Hardware, step_seconds: float) -> Failures:
    """Return what fails on the run's GPUs, with the stall and the interval of the run's own saves.

    Args:
        job: the run on its GPUs.
        hardware: profile.
        step_seconds: time of a step without saves.
    """
    config = job.config
    copied = checkpoint_bytes(config) / job.num_gpus  # each part of it by one GPU
    steps = total_steps(config)  # there is a save at the end
    every, local = config.train.save_every_steps or steps, config.checkpoint
    return Failures(
        num_gpus=job.num_gpus,
        gpus_per_node=hardware.gpus_per_node,
        save_stall_seconds=copied / (hardware.host_copy_gb_per_second * 1e9),
        save_interval_seconds=min(every, steps) * step_seconds,
        local_interval_seconds=local.local_every_steps * step_seconds
        if local.local_folder
        else None,
    )


def best_save_every_steps(job: Job, failures: Failures, step_seconds: float) -> int:
    """Return the number of steps between saves that loses least time, at most the run's steps."""
    steps = min(best_interval(failures) / step_seconds, total_steps(job.config))
    return max(1, round(steps))


def _interval_warnings(job: Job, failures: Failures, step_seconds: float) -> Iterator[str]:
    every = job.config.train.save_every_steps
    best = best_save_every_steps(job, failures, step_seconds)
    share = expected_share(failures)
    possible = expected_share(replace(failures, save_interval_seconds=best * step_seconds))
    if possible - share > WORTH_SAYING:
        yield (
            f"train.save_every_steps={every or 'null (one save, at the end)'} leaves {share:.1%} of the "
            f"time for training under failures; train.save_every_steps={best} leaves {possible:.1%}"
        )


def _warnings(job: Job, hardware: Hardware, memory: list[StageMemory]) -> Iterator[str]:
    config, parallel = job.config, job.config.parallel
    fullest = max(range(len(memory)), key=lambda s: memory[s].total)
    total, limit = memory[fullest].total / 1e9, hardware.memory_gb
    if total > limit:
        states = memory[fullest].total - memory[fullest].activations - memory[fullest].logits
        what = (
            "raise parallel.tensor or parallel.pipeline, or use more GPUs"
            if states / 1e9 > limit
            else "lower train.micro_batch_rows, set parallel.recompute=full or raise parallel.tensor"
        )
        yield f"stage {fullest} needs {total:.0f} GB of {limit:g} GB: {what}"
    elif total > 0.92 * limit:
        yield f"stage {fullest} fills {total:.0f} GB of {limit:g} GB; fragmentation may overflow it"
    size = head_size(config.model)
    if config.precision.fp8 != "off" and size != 128:
        yield f"head size {size} under FP8: FP8 attention would need 128 (model.head_size)"
    padded = padded_vocab_size(config.model)
    if padded % (COLUMNS * parallel.tensor):
        yield (
            f"the vocabulary, {padded} with its padding, gives each of parallel.tensor={parallel.tensor} "
            f"ranks {padded / parallel.tensor:g} columns, not a multiple of {COLUMNS}: the head's "
            f"products run slower; set model.vocab_padding_multiple={COLUMNS * parallel.tensor}"
        )
    if parallel.tensor > hardware.gpus_per_node:
        yield (
            f"parallel.tensor={parallel.tensor} spans nodes of {hardware.gpus_per_node} GPUs: its "
            "traffic leaves the fast links; lower it and use parallel.pipeline"
        )
    bubble = step_time(job, hardware)
    if bubble.pipeline_bubble > 0.15 * bubble.total:
        yield (
            f"the pipeline idles {bubble.pipeline_bubble / bubble.total:.0%} of the step: raise "
            "parallel.virtual_pipeline or train.global_batch_rows"
        )
    if len(set(job.stage_layers)) > 1:
        yield (
            f"model.num_layers={config.model.num_layers} is not divisible by parallel.pipeline="
            f"{parallel.pipeline}, as this trainer needs"
        )
