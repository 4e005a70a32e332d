"""``megatron-eso doctor``: what this machine can do, and whether a requested backend is available."""

import os
from pathlib import Path
from typing import Annotated

import typer

from megatron_eso.cli.application import application

app = application()


@app.command()
def doctor(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value ... for --run or --check")
    ] = None,
    check: Annotated[
        str | None,
        typer.Option("--check", help="Check that this works here: te, fp8 or fp8-attention"),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option("--run", help="Check that this configuration's precision settings work here"),
    ] = None,
) -> None:
    """Print devices, versions, matmul speed, and which backends `auto` would choose and why.

    With --check or --run, only print whether this machine (a rank's GPU) can run what is asked for; if
    not, name every rule that forbids it and exit with code 2.

    Examples:
        megatron-eso doctor
        megatron-eso doctor --check fp8-attention
        megatron-eso doctor --run RUN.yaml precision.fp8=tensorwise
    """
    if check is not None or run is not None or overrides:
        _require(check, run, overrides or [])
        return
    from megatron_eso.config import load_config
    from megatron_eso.config.precision_rules import ASKED, process_environment

    # Set what a run would set, so that Transformer Engine answers for the attention a run may use.
    os.environ.update(process_environment(load_config(None, list(ASKED["te"]))))
    from rich.console import Console
    from rich.table import Table

    from megatron_eso.parallel.diagnosis import diagnose

    table = Table("what", "found", "what follows")
    for finding in diagnose():
        table.add_row(finding.what, finding.found, finding.consequence)
    Console().print(table)


def _require(asked: str | None, run: Path | None, overrides: list[str]) -> None:
    from megatron_eso.config import check, load_config
    from megatron_eso.config.precision_rules import ASKED, process_environment
    from megatron_eso.errors import ConfigError

    if (asked is None) == (run is None):
        raise ConfigError(f"give either --run FILE or --check with one of {', '.join(ASKED)}")
    if asked is not None and asked not in ASKED:
        raise ConfigError(f"--check {asked} is not one of {', '.join(ASKED)}")
    config = load_config(run, [*ASKED.get(asked or "", ()), *overrides])
    check(config)
    os.environ.update(process_environment(config))

    from megatron_eso.parallel.te_adapter import describe_machine
    from megatron_eso.parallel.te_diagnosis import refusals

    found = refusals(describe_machine(), config)
    if found:
        raise ConfigError(
            f"{asked or run} does not run here:\n" + "\n".join(f"  - {line}" for line in found)
        )
    typer.echo(f"{asked or run}: nothing forbids it on this machine")
