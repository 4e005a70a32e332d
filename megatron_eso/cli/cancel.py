"""``megatron-eso cancel``: end the job of a run."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_eso.cli.application import application

app = application()


@app.command()
def cancel(
    run: Annotated[Path, typer.Argument(help="Run folder")],
    after_checkpoint: Annotated[
        bool, typer.Option("--after-checkpoint", help="Save a checkpoint first")
    ] = False,
) -> None:
    """Cancel the job of a run; submitting the run again continues from its last checkpoint.

    Examples:
        megatron-eso cancel runs/quickstart
        megatron-eso cancel runs/quickstart --after-checkpoint
    """
    from megatron_eso.launch import control

    typer.echo(control.cancel(run, after_checkpoint=after_checkpoint))
