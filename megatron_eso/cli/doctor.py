"""``megatron-eso doctor``: what this machine can do, and which backends would be chosen."""

import typer

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def doctor() -> None:
    """Print devices, package versions, measured matmul speed and the backends `auto` would choose.

    Examples:
        megatron-eso doctor
    """
    from rich.console import Console
    from rich.table import Table

    from megatron_eso.parallel.diagnosis import diagnose

    table = Table("what", "found", "what follows")
    for finding in diagnose():
        table.add_row(finding.what, finding.found, finding.consequence)
    Console().print(table)
