"""``megatron-eso logs``: the output of a submitted run."""

import os
from pathlib import Path
from typing import Annotated

import typer

from megatron_eso.cli.application import application

app = application()


@app.command()
def logs(
    run: Annotated[Path, typer.Argument(help="Run folder")],
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as it grows")] = False,
    lines: Annotated[int, typer.Option("-n", help="Lines from the end")] = 50,
) -> None:
    """Print the newest job output of a run, all attempts in one file; of an array, its newest task's.

    Examples:
        megatron-eso logs runs/quickstart
        megatron-eso logs -f runs/quickstart
    """
    from megatron_eso.errors import ClusterError

    found = [*run.glob("slurm-*.out")] or [*run.glob("[0-9]*/slurm-*.out")]  # an array's tasks
    files = sorted(found, key=lambda path: path.stat().st_mtime)
    if not files:
        raise ClusterError(f"{run} has no slurm-JOB.out yet; `megatron-eso status {run}` says why")
    tail = ["tail", f"--lines={lines}", *(["--follow"] if follow else []), "--", str(files[-1])]
    os.execvp(tail[0], tail)
