"""``megatron-eso train``: train on the ranks that a launcher started, or start them here."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_eso.cli.application import application

app = application()


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="Run configuration (YAML)")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...")] = None,
    ranks: Annotated[
        int | None,
        typer.Option(min=1, help="Ranks to start on this machine [parallel.local_ranks]"),
    ] = None,
) -> None:
    """Train a model; the same command continues a run that was stopped.

    Under torchrun or Slurm (RANK is set) this process is one rank of the run; otherwise several ranks
    are started and supervised, as `megatron-eso launch` does. Exit codes: 0 finished, 75 stopped by a
    signal with a checkpoint, others are errors (docs/resilience.md).

    Examples:
        megatron-eso train configs/run/quickstart.yaml
        megatron-eso train configs/run/quickstart.yaml name=tp2 parallel.tensor=2 train.steps=50
        torchrun --nproc-per-node 8 -m megatron_eso train RUN.yaml
    """
    from megatron_eso.config import check_start, load_run
    from megatron_eso.config.precision_rules import process_environment
    from megatron_eso.garbage import look_at_new_objects
    from megatron_eso.launch.processes import ignore_signals
    from megatron_eso.resilience.signals import StopRequest

    stop = StopRequest()
    if "RANK" in os.environ:
        stop.install()  # before the imports below, which take seconds
    run_config = load_run(config, overrides)
    os.environ.update(process_environment(run_config))
    if "RANK" not in os.environ:
        number = ranks or run_config.parallel.local_ranks
        check_start(run_config, number)
        if number > 1:
            from megatron_eso.cli.launch import launch

            launch(config, overrides, number)
        stop.install()

    from megatron_eso.launch.environment import Ranks
    from megatron_eso.parallel.finish import finish
    from megatron_eso.train.loop import Run

    run = Run(run_config, Ranks.from_environment(os.environ), stop)
    look_at_new_objects()
    code = run.train()
    ignore_signals()
    sys.stdout.flush()
    finish()
    raise SystemExit(code)
