"""``megatron-eso config``: show a configuration before running it."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_eso.cli.application import application

app = application(
    no_args_is_help=True,
    help="Show a resolved configuration.",
)


@app.callback()
def _group() -> None:
    """Look at a configuration before running it."""


@app.command()
def show(
    config: Annotated[Path, typer.Argument(help="Run configuration (YAML)")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...")] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Number of ranks [parallel.local_ranks]")
    ] = None,
) -> None:
    """Print every setting of a run, check them, and print derived numbers.

    Includes and overrides are applied first.

    Examples:
        megatron-eso config show configs/run/quickstart.yaml parallel.tensor=2
    """
    from megatron_eso.config import check, load_config, to_yaml
    from megatron_eso.config.derive import derive

    run_config = load_config(config, overrides)
    typer.echo(to_yaml(run_config))
    number = ranks or run_config.parallel.local_ranks
    check(run_config, number)
    typer.echo(f"# derived, on {number} rank(s):")
    for line in derive(run_config, number).lines():
        typer.echo(f"#   {line}")
