"""``megatron-eso inspect``: names, shapes, dtypes, counts, and what could not be exported and why."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_eso.cli.application import application

app = application()


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Checkpoint, run, or exported folder")],
    optimizer: Annotated[bool, typer.Option(help="Also list the optimizer's tensors")] = False,
) -> None:
    """List the tensors of a checkpoint or an exported folder, without loading them.

    Examples:
        megatron-eso inspect runs/quickstart
        megatron-eso inspect exported
    """
    from megatron_eso.errors import CheckpointError
    from megatron_eso.export.inspect_tensors import inspect as look

    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder; give a checkpoint, a run or an export")
    found = look(path)
    for line in found.lines:
        if optimizer or not line.name.startswith("exp_avg"):
            shape = " x ".join(map(str, line.shape))
            typer.echo(f"{line.name}  [{shape}]  {line.dtype}  -> {line.becomes}")
    typer.echo(f"{found.num_parameters:,} parameters")
    for remark in found.remarks:
        typer.echo(remark)
