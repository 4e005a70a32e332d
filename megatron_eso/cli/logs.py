"""``megatron-eso logs``: print the output of a run."""

import os
from pathlib import Path
from typing import Annotated

import typer

from megatron_eso.cli.application import application

app = application()


@app.command()
def logs(
    run: Annotated[Path, typer.Argument(help="Run folder")],
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Print new lines as they come")
    ] = False,
    lines: Annotated[int, typer.Option("-n", help="Number of lines from the end")] = 50,
) -> None:
    """Print the end of a run's newest job output.

    One file holds all attempts; of an array, the newest task's file is shown. Of a run that was never
    submitted to Slurm, log.txt is shown, which the training itself writes.

    Examples:
        megatron-eso logs runs/quickstart
        megatron-eso logs -f runs/quickstart
    """
    from megatron_eso.launch.records import tasks_of

    found = [path for place in tasks_of(run) or [run] for path in place.glob("slurm-*.out")]
    files = sorted(found, key=lambda path: path.stat().st_mtime) or [_own_log(run)]
    tail = ["tail", f"--lines={lines}", *(["--follow"] if follow else []), "--", str(files[-1])]
    os.execvp(tail[0], tail)


def _own_log(run: Path) -> Path:
    """Return the log of a run that was not submitted; otherwise raise an error that says what is there."""
    from megatron_eso.errors import ClusterError
    from megatron_eso.launch.records import Records

    if not run.is_dir():
        raise ClusterError(f"{run} is not a folder; give a run folder")
    if Records(run).submission():
        raise ClusterError(f"{run} has no slurm-JOB.out yet; `megatron-eso status {run}` says why")
    log = run / "log.txt"
    if not log.is_file():
        raise ClusterError(
            f"{run} holds no run: it has neither a Slurm job (slurm/job.json) nor a log.txt"
        )
    typer.echo(f"{run} was not submitted to Slurm; this is the training's own {log}", err=True)
    return log
