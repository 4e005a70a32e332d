"""``megatron-eso submit``: submit a run to Slurm."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_eso.cli.application import application

app = application()


@app.command()
def submit(
    config: Annotated[Path, typer.Argument(help="Run configuration (YAML)")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, cluster.key=value ...")
    ] = None,
    cluster: Annotated[str, typer.Option(help="Cluster profile: name or YAML file")] = "generic",
    nodes: Annotated[int | None, typer.Option(help="Nodes that train [cluster.nodes]")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the job script only")] = False,
    test_only: Annotated[
        bool, typer.Option("--test-only", help="Ask Slurm whether and when the job could start")
    ] = False,
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="Overrides of one array task, 'key=value key=value'; repeatable"),
    ] = None,
    throttle: Annotated[
        int, typer.Option(help="With --sweep: tasks to run at once; 0: no limit")
    ] = 0,
) -> None:
    """Submit a run to Slurm; submitting the same run again continues it.

    The job saves before its time limit and requeues itself until the run has finished.

    Examples:
        megatron-eso submit RUN.yaml --cluster gcp-a3-mega --nodes 4
        megatron-eso submit RUN.yaml --cluster local --dry-run
        megatron-eso submit RUN.yaml cluster.time_limit=4:00:00 train.steps=1000
        megatron-eso submit RUN.yaml --sweep train.seed=1 --sweep train.seed=2 --throttle 1
    """
    import shlex

    from megatron_eso.data.fits import unseen_data
    from megatron_eso.launch import submit as launcher
    from megatron_eso.launch.profile import load_profile
    from megatron_eso.plan.fit import plan_lines, require_time_for_a_checkpoint

    given = overrides or []
    own = [o.removeprefix("cluster.") for o in given if o.startswith("cluster.")]
    own += [f"nodes={nodes}"] if nodes is not None else []
    rest = [o for o in given if not o.startswith("cluster.")]
    tasks = [_words(task) for task in sweep] if sweep else None
    profile = load_profile(cluster, own)
    _check_throttle(throttle, profile.survival.requeue, is_array=tasks is not None)
    plan = launcher.prepare(config, rest, profile, tasks)
    step_seconds, said = 0.0, []
    if profile.hardware:
        num_gpus = profile.nodes * profile.tasks_per_node
        step_seconds, said = plan_lines(plan.config, num_gpus, profile.hardware)
    for line in said:
        typer.echo(line, err=True)
    require_time_for_a_checkpoint(
        plan.config,
        gb_per_second=profile.checkpoint_gb_per_second,
        signal_seconds=profile.survival.signal_seconds,
        step_seconds=step_seconds,
    )
    for line in unseen_data(plan.tasks):
        typer.echo(f"not checked: {line}; the job checks it when it starts", err=True)
    if dry_run:
        typer.echo(plan.script)
        return
    if test_only:
        typer.echo(launcher.test_only(plan))
        return
    job = launcher.submit(plan, throttle=throttle)
    typer.echo(f"job {job} submitted; run folder {plan.job.run}")
    folder = shlex.quote(str(plan.job.run))
    typer.echo(f"next: megatron-eso status {folder}   |   megatron-eso logs -f {folder}")


def _words(task: str) -> list[str]:
    """Return the overrides of one array task."""
    import shlex

    from megatron_eso.errors import ConfigError

    try:
        return shlex.split(task)
    except ValueError as error:
        raise ConfigError(
            f"--sweep {task}: {error}; it is split as a shell would: write a quote in a value as \\' or "
            'within "..."'
        ) from None


def _check_throttle(throttle: int, requeue: str, *, is_array: bool) -> None:
    from megatron_eso.errors import ClusterError

    if throttle < 0:
        raise ClusterError(f"--throttle {throttle} must not be negative; 0 sets no limit")
    if throttle and not is_array:
        raise ClusterError(
            f"--throttle {throttle} limits the tasks of an array, and there is no --sweep: leave it out"
        )
    if throttle and requeue == "chain":
        raise ClusterError(
            f"--throttle {throttle} limits one array, but with cluster.survival.requeue=chain each task "
            "continues as an array of its own; leave --throttle out or set cluster.survival.requeue=requeue"
        )
