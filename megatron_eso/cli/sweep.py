"""``megatron-eso sweep``: a scaling study from plan to plot."""

from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_eso.cli.application import application

app = application(
    no_args_is_help=True,
    help="Plan, run, collect, fit and report a scaling study.",
)
SweepFile = Annotated[Path, typer.Argument(help="Sweep configuration (YAML)")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value ...")]
Keep = Annotated[list[str] | None, typer.Option(help="Fit this cell though doubtful or diverged")]


@app.command()
def plan(sweep: SweepFile, overrides: Overrides = None) -> None:
    """Print the grid: sizes, steps, FLOPs, cost, and illegal cells.

    Examples:
        megatron-eso sweep plan configs/sweep/laptop.yaml
    """
    from megatron_eso.scaling.grid import grid_table, make_grid

    typer.echo(grid_table(make_grid(sweep, overrides)[1]))


@app.command()
def run(
    sweep: SweepFile,
    overrides: Overrides = None,
    workers: Annotated[int, typer.Option(help="Cells to run at once on this machine")] = 1,
    max_attempts: Annotated[int, typer.Option(help="Give a cell up after this many failures")] = 2,
    cell: Annotated[
        int | None, typer.Option(help="Run only the cell of this number (for Slurm arrays)")
    ] = None,
    slurm: Annotated[
        bool, typer.Option("--slurm", help="Submit the cells as a Slurm array")
    ] = False,
    throttle: Annotated[
        int | None, typer.Option(help="With --slurm: array tasks to run at once [8]")
    ] = None,
    sbatch: Annotated[
        list[str] | None, typer.Option(help="With --slurm: another sbatch option; repeatable")
    ] = None,
) -> None:
    """Run the cells that are not finished yet.

    The same command continues after an interruption, which does not count as a failure of a cell.

    Examples:
        megatron-eso sweep run configs/sweep/laptop.yaml --workers 2
        megatron-eso sweep run configs/sweep/paper.yaml --slurm --sbatch=--gpus-per-node=8
    """
    from megatron_eso.errors import ConfigError
    from megatron_eso.scaling import commands

    def look_here(runs: list[Any]) -> None:
        from megatron_eso.data.open_split import require_data

        require_data(runs)

    def look_from_afar(runs: list[Any]) -> None:
        from megatron_eso.data.fits import unseen_data

        for line in unseen_data(runs):
            typer.echo(f"not checked: {line}; the cells check it when they start", err=True)

    if slurm and cell is not None:
        raise ConfigError("--slurm submits all cells, --cell runs one here: give one of them")
    if sbatch and not slurm:
        raise ConfigError("--sbatch applies only to --slurm: without it cells run on this machine")
    if throttle is not None and not slurm:
        raise ConfigError(
            "--throttle applies only to --slurm: without it --workers sets how many cells run at once"
        )
    if slurm:
        throttle = 8 if throttle is None else throttle
        typer.echo(
            commands.submit_array(
                sweep, overrides, workers, max_attempts, throttle, sbatch or [], look=look_from_afar
            )
        )
        return
    ok = commands.run(sweep, overrides, workers, max_attempts, cell, say=typer.echo, look=look_here)
    raise typer.Exit(0 if ok else 5)


@app.command()
def status(
    sweep: SweepFile,
    overrides: Overrides = None,
    max_attempts: Annotated[int, typer.Option(help="As given to `sweep run`")] = 2,
) -> None:
    """Print where every cell stands.

    Examples:
        megatron-eso sweep status configs/sweep/laptop.yaml
    """
    from megatron_eso.scaling import commands

    typer.echo(commands.status(sweep, overrides, max_attempts))


@app.command()
def collect(
    sweep: SweepFile,
    overrides: Overrides = None,
    tensorboard: Annotated[
        Path | None,
        typer.Option(
            help="Instead, tabulate the TensorBoard runs of another trainer in this folder"
        ),
    ] = None,
    tag: Annotated[
        str | None, typer.Option(help="With --tensorboard: scalar to read [lm loss]")
    ] = None,
) -> None:
    """Write tables of cells and of logged steps.

    They are cells.csv and steps.csv, one row for each, and .parquet files beside them.

    Examples:
        megatron-eso sweep collect configs/sweep/laptop.yaml
    """
    from megatron_eso.errors import ConfigError
    from megatron_eso.scaling import commands

    if tag is not None and tensorboard is None:
        raise ConfigError("--tag applies only to --tensorboard: give that folder too")
    typer.echo(commands.collect(sweep, overrides, tensorboard, "lm loss" if tag is None else tag))


@app.command()
def fit(
    table: Annotated[Path, typer.Argument(help="cells.csv or cells.parquet")],
    budget: Annotated[float | None, typer.Option(help="Extrapolate to this many FLOPs")] = None,
    keep: Keep = None,
) -> None:
    """Fit scaling laws to a table of cells and print them.

    These are IsoFLOP parabolas, power laws and L = E + A/N^a + B/D^b, with intervals.

    Left out and named are cells that diverged, or that a smaller model on no more tokens clearly beats.

    Examples:
        megatron-eso sweep fit runs/sweep-laptop/cells.csv --budget 1e13
    """
    from megatron_eso.scaling import commands

    typer.echo(commands.fit(table, budget, keep or []))


@app.command()
def report(
    table: Annotated[Path, typer.Argument(help="cells.csv or cells.parquet")],
    out: Annotated[Path, typer.Option(help="HTML page; a PNG is written beside it")],
    budget: Annotated[float | None, typer.Option(help="Extrapolate to this many FLOPs")] = None,
    note: Annotated[Path | None, typer.Option(help="Text file to show at the top")] = None,
    keep: Keep = None,
) -> None:
    """Write a self-contained HTML page of a study.

    It shows IsoFLOP curves, fits, residuals, the frontier and tables.

    Examples:
        megatron-eso sweep report runs/sweep-laptop/cells.csv --out report.html
    """
    from megatron_eso.scaling import commands

    typer.echo(commands.report(table, out, budget, note, keep or []))
