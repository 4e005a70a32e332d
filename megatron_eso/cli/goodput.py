"""``megatron-eso goodput``: where a run's time went."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from megatron_eso.cli.application import application

app = application()


@app.command()
def goodput(
    run: Annotated[Path, typer.Argument(help="Run folder")],
    plot: Annotated[Path | None, typer.Option(help="Write a timeline (.png, .svg, .pdf)")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON")] = False,
) -> None:
    """Show the effective training time of a run, the time lost to each cause, and the faults.

    Examples:
        megatron-eso goodput runs/quickstart
        megatron-eso goodput runs/quickstart --plot timeline.png
    """
    from megatron_eso.launch.ledger import CAUSES, read_ledger

    ledger = read_ledger(run)
    if plot is not None:
        from megatron_eso.launch.timeline import write_timeline

        write_timeline(ledger, plot)
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "effective_share": ledger.effective_share,
                    "elapsed_seconds": ledger.elapsed,
                    "mean_seconds_between_failures": ledger.mean_seconds_between_failures,
                    "seconds": {cause: ledger.seconds(cause) for cause in CAUSES},
                    **{k: v for k, v in asdict(ledger).items() if k != "stretches"},
                }
            )
        )
        return
    typer.echo("\n".join(ledger.lines()))
