"""``megatron-eso launch``: train under supervision, restarting after crashes and hangs."""

import os
from pathlib import Path
from typing import Annotated

import typer

from megatron_eso.cli.application import application

app = application()


@app.command()
def launch(
    config: Annotated[Path, typer.Argument(help="Run configuration (YAML)")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...")] = None,
    ranks: Annotated[
        int | None,
        typer.Option(min=1, help="Ranks to start on this machine [parallel.local_ranks]"),
    ] = None,
    warm: Annotated[
        bool | None,
        typer.Option(
            help="Fork ranks from a process that has imported everything [if there is no GPU]"
        ),
    ] = None,
    agent: Annotated[
        str, typer.Option(help="Who supervises: own, torchrun (misses hangs) or ft_launcher")
    ] = "own",
) -> None:
    """Train on this machine's ranks and restart them from the newest checkpoint after a fault.

    When a rank dies, hangs or is stopped, all ranks are ended and started again. Under srun (RANK is
    set) this supervises one rank, and the job script restarts all of them.

    Exit codes: 0 finished, 2 to 6 an error that a restart would not cure, 7 given up after faults in a
    row without a newer checkpoint, 8 no progress (one rank under srun), 75 stopped by a signal.

    Examples:
        megatron-eso launch configs/run/quickstart.yaml --ranks 2
        megatron-eso launch RUN.yaml resilience.max_restarts_without_progress=5
        megatron-eso launch RUN.yaml --ranks 8 --agent ft_launcher
    """
    from megatron_eso.config import check_start, load_run
    from megatron_eso.errors import ClusterError
    from megatron_eso.launch.agents import agent_command, agent_environment
    from megatron_eso.launch.environment import rank_environment
    from megatron_eso.launch.starter import can_be_warm
    from megatron_eso.launch.supervisor import Supervision, supervise

    run_config = load_run(config, overrides)
    arguments = ["train", str(config), *(overrides or [])]
    place = rank_environment(os.environ)
    number = 1 if place else ranks or run_config.parallel.local_ranks
    if not place:
        check_start(run_config, number)
    settings = run_config.resilience
    if agent != "own":
        if place:
            raise ClusterError(
                f"--agent {agent} starts the ranks itself, but RANK is set, so another launcher did: leave "
                "--agent out, or unset RANK"
            )
        command = agent_command(
            agent, arguments, num_ranks=number,
            max_restarts=settings.max_restarts_without_progress,
            setup_seconds=settings.setup_timeout_seconds,
        )  # fmt: skip
        os.execve(command[0], command, agent_environment(os.environ))
    code = supervise(
        Supervision(
            arguments=arguments,
            num_ranks=number,
            run=Path(run_config.folder),
            setup_timeout_seconds=settings.setup_timeout_seconds,
            max_restarts=0 if place else settings.max_restarts_without_progress,
            is_warm=(can_be_warm() and not place) if warm is None else warm,
            rank_environment=place or None,
            # resume=never concerns earlier checkpoints: a restart continues from the run's own.
            arguments_to_go_on=("checkpoint.resume=auto",),
        )
    )
    raise SystemExit(code)
