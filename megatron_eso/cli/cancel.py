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
        bool, typer.Option("--after-checkpoint", help="Save first, then end without a requeue")
    ] = False,
) -> None:
    """Cancel the job of a run; submitting it again continues from the last checkpoint.

    Examples:
        megatron-eso cancel runs/quickstart
        megatron-eso cancel runs/quickstart --after-checkpoint
    """
    from megatron_eso.launch import control

    typer.echo(control.cancel(run, after_checkpoint=after_checkpoint))
