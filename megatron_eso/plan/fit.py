"""Does a run fit the cluster it is about to be submitted to? `submit` asks this before it asks Slurm."""

from megatron_eso.config.schema import RunConfig
from megatron_eso.errors import ClusterError
from megatron_eso.plan.estimate import make_plan
from megatron_eso.plan.hardware import load_hardware
from megatron_eso.plan.job import Job
from megatron_eso.plan.parameters import checkpoint_bytes


def require_time_for_a_checkpoint(
    config: RunConfig, *, gb_per_second: float, signal_seconds: float, step_seconds: float
) -> None:
    """Raise unless a checkpoint can be written between the walltime signal and the time limit.

    Args:
        config: the run.
        gb_per_second: speed at which a checkpoint is written.
        signal_seconds: time from the signal to the limit.
        step_seconds: time of a step, since the one under way at the signal is finished first; 0: not
            known.

    Raises:
        ClusterError: if it cannot; the job would be killed while it saves, at every limit.
    """
    gigabytes = checkpoint_bytes(config) / 1e9
    # This does not count on Slurm's KillWait.
    seconds = gigabytes / gb_per_second
    if step_seconds + seconds > signal_seconds:
        step = f"the step under way {step_seconds:.0f} s and " if step_seconds >= 1 else ""
        raise ClusterError(
            f"{step}a checkpoint of {gigabytes:.1f} GB takes {seconds:.0f} s at cluster."
            f"checkpoint_gb_per_second={gb_per_second:g}, but the job is told only cluster.survival."
            f"signal_seconds={signal_seconds:g} before its time limit: raise signal_seconds (and "
            "time_limit with it), or correct checkpoint_gb_per_second"
        )


def plan_lines(config: RunConfig, num_gpus: int, hardware_name: str) -> tuple[float, list[str]]:
    """Return the seconds of a step, and what the planner says about the run in a few lines.

    Raises:
        ClusterError: if a stage does not fit into a GPU's memory.
    """
    hardware = load_hardware(hardware_name)
    plan = make_plan(Job(config, num_gpus), hardware)
    most = max(stage.total for stage in plan.memory) / 1e9
    if most > hardware.memory_gb:
        raise ClusterError(
            f"planner ({hardware.name}, {num_gpus} GPUs): {'; '.join(plan.warnings)}. `megatron-eso plan "
            "--search` ranks the layouts; cluster.hardware='' submits without this check"
        )
    first = (
        f"planner ({hardware.name}): {most:.1f} of {hardware.memory_gb:g} GB a GPU, "
        f"{plan.time.total:.2f} s a step, {plan.tokens_per_second:,.0f} tokens/s"
    )
    return plan.time.total, [first, *(f"planner: {warning}" for warning in plan.warnings)]
