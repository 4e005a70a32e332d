"""``megatron-eso requeue``: let a held or failed job try again."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_eso.cli.application import application

app = application()


@app.command()
def requeue(run: Annotated[Path, typer.Argument(help="Run folder")]) -> None:
    """Release the held job of a run, or requeue a failed one; its count of failures starts over.

    Examples:
        megatron-eso requeue runs/quickstart
    """
    from megatron_eso.launch import control

    typer.echo(control.requeue(run))
