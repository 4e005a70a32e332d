"""The learning rate as a function of the step: linear warm-up, then constant, cosine or wsd."""

import math

from megatron_eso.config.derive import wsd_decay_steps
from megatron_eso.config.schema import OptimizerConfig


def learning_rate(step: int, optimizer: OptimizerConfig, total_steps: int) -> float:
    """Return the learning rate of optimizer step ``step`` (from 0) of ``total_steps``."""
    peak, low = optimizer.learning_rate, optimizer.min_learning_rate
    if step < optimizer.warmup_steps:
        return peak * (step + 1) / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return peak
    if optimizer.schedule == "cosine":
        length = optimizer.decay_steps or total_steps - optimizer.warmup_steps
        done = min((step - optimizer.warmup_steps) / max(length, 1), 1.0)
        return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * done))
    left = min((total_steps - step) / wsd_decay_steps(optimizer, total_steps), 1.0)
    return low + (peak - low) * max(left, 0.0)


def change_of_schedule(step: int, optimizer: OptimizerConfig, *, before: int, now: int) -> str:
    """Return how the learning rate jumps when a run continues with another length; empty if it does not.

    Args:
        step: steps done, at least one.
        optimizer: the schedule.
        before: total steps of the run when they were done.
        now: total steps of the run from here on.
    """
    following = learning_rate(step, optimizer, now)
    if following == learning_rate(step, optimizer, before):
        return ""
    last = learning_rate(step - 1, optimizer, before)
    return (
        f"the run had {before} steps and has {now} now, which optimizer.schedule={optimizer.schedule} "
        f"follows: the learning rate is {last:.4g} in step {step} and {following:.4g} in step {step + 1}"
    )
