"""Jobs that several tests of the planner look at."""

from dataclasses import replace

from megatron_eso.config.schema import (
    ModelConfig,
    ObjectiveConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    TrainConfig,
)
from megatron_eso.plan.job import Job

SEVEN_B = ModelConfig(
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    vocab_size=131072,
    activation="gelu",
    max_length=4096,
)


def job(
    gpus: int = 64, *, objective: str = "ar", alpha_0: float = 1.0, micro: int = 1, **parallel
) -> Job:
    return Job(
        RunConfig(
            model=SEVEN_B,
            objective=ObjectiveConfig(name=objective, alpha_0=alpha_0),
            train=TrainConfig(
                sequence_length=4096, global_batch_rows=512, micro_batch_rows=micro, steps=1000
            ),
            parallel=ParallelConfig(**parallel),
            precision=PrecisionConfig(dtype="bf16"),
        ),
        gpus,
    )


def with_model(base: Job, **changes) -> Job:
    return replace(base, config=replace(base.config, model=replace(base.config.model, **changes)))
