"""``megatron-eso status``: show where submitted runs are."""

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from megatron_eso.cli.application import application

app = application()


@app.command()
def status(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Run folders [all of your jobs in the queue]")
    ] = None,
) -> None:
    """Show job, step, loss, speed, last checkpoint, bad nodes and where the time went.

    Of a run folder also where Slurm cannot be asked: then what the folder says.

    Examples:
        megatron-eso status
        megatron-eso status runs/quickstart
    """
    from megatron_eso.errors import ClusterError
    from megatron_eso.launch import control, records, report, slurm

    jobs, unasked = [], ""
    try:
        jobs = slurm.queue()
    except ClusterError as error:
        if not runs:
            raise
        unasked = f"Slurm could not be asked: {str(error).splitlines()[0]}"
    by_folder = {job.run: job for job in jobs if job.run}
    folders = runs or [Path(job.folder) for job in jobs if job.run]
    control.require_folders(folders)
    folders = [task for folder in folders for task in records.tasks_of(folder) or [folder]]
    found = [
        (f, by_folder.get(Path(os.path.realpath(f))) or report.job_of_task(f, jobs))
        for f in folders
    ]
    now = time.time()
    if len(found) == 1:
        typer.echo("\n".join(report.describe(*found[0], now, unasked=unasked)))
        return
    if unasked:
        typer.echo(unasked)
    for folder, job in found:
        typer.echo(report.one_line(folder, job, now))
    if not folders:
        typer.echo("you have no jobs in the queue; `megatron-eso status RUN` shows a run folder")
