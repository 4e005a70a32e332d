"""``megatron-eso watch``: shorten the wait of requeued jobs, from the login node."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_eso.cli.application import application

app = application()


@app.command()
def watch(
    runs: Annotated[list[Path] | None, typer.Argument(help="Run folders [all]")] = None,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between looks at the queue")] = 5.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, then end")] = False,
) -> None:
    """Start requeued jobs at once instead of after Slurm's credential wait (2-10 minutes).

    Examples:
        megatron-eso watch runs/quickstart
    """
    from megatron_eso.launch import control

    control.watch(runs, every_seconds=every, once=once, say=typer.echo)
