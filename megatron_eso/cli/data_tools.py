"""The subcommands of ``megatron-eso data`` that read prepared splits."""

from pathlib import Path
from typing import Annotated

import typer

Split = Annotated[str, typer.Argument(help="A split: .../train or .../validation.")]


def inspect_command(
    split: Split,
    rows: Annotated[list[int] | None, typer.Option("--row", help="Rows to print [0].")] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Write a histogram of document lengths (.png).")
    ] = None,
    max_rows: Annotated[
        int | None, typer.Option(help="Rows to count document lengths in [all].")
    ] = None,
) -> None:
    """Print a split's counts and the text of some rows; draw its documents' lengths.

    Examples:
      megatron-eso data inspect runs/data/stdlib/train --row 0 --row 7 --picture lengths.png
    """
    from dataclasses import asdict

    from megatron_eso.config.schema import DataConfig
    from megatron_eso.data.inspect import decoded_rows, document_lengths, draw_lengths
    from megatron_eso.data.open_split import open_split, tokenizer_of

    data = DataConfig()
    opened = open_split(split, data)
    tokenizer = tokenizer_of(split, opened.manifest, data)
    for name, value in asdict(opened.manifest).items():
        typer.echo(f"{name:20} {value}")
    numbers = rows or [0]
    for number, text in zip(numbers, decoded_rows(opened, tokenizer, numbers), strict=True):
        typer.echo(f"\n--- row {number} ---\n{text}")
    if picture is not None:
        draw_lengths(document_lengths(opened, max_rows), opened.manifest, picture)
        typer.echo(f"\n{picture}: lengths of documents")


def verify_command(splits: Annotated[list[str], typer.Argument(help="Splits to read.")]) -> None:
    """Read every shard and compare sizes, hashes, token ids and counts.

    Examples:
      megatron-eso data verify runs/data/stdlib/train runs/data/stdlib/validation
    """
    from megatron_eso.config.schema import DataConfig
    from megatron_eso.data.verify import verify_split

    for split in splits:
        num_rows = verify_split(split, DataConfig(), typer.echo)
        typer.echo(f"{split}: {num_rows:,} rows are whole")
