"""The subcommands of ``megatron-eso data`` that read prepared splits."""

from pathlib import Path
from typing import Annotated

import typer

Split = Annotated[str, typer.Argument(help="Prepared split: .../train or .../validation.")]


def inspect_command(
    split: Split,
    rows: Annotated[
        list[int] | None, typer.Option("--row", help="Row to print; repeatable [0].")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Write a histogram of document lengths (.png).")
    ] = None,
    max_rows: Annotated[
        int | None, typer.Option(help="With --picture: number of rows to read lengths from [all].")
    ] = None,
) -> None:
    """Print a split's counts and the text of some rows.

    With --picture, also draw a histogram of its documents' lengths.

    Examples:
      megatron-eso data inspect runs/data/stdlib/train --row 0 --row 7 --picture lengths.png
    """
    from dataclasses import asdict

    from megatron_eso.config.schema import DataConfig
    from megatron_eso.data.inspect import (
        decoded_rows,
        document_lengths,
        draw_lengths,
        require_picture,
    )
    from megatron_eso.data.open_split import open_split, tokenizer_of
    from megatron_eso.errors import DataError

    if max_rows is not None and picture is None:
        raise DataError(
            f"--max-rows {max_rows} applies only to --picture: add --picture FILE, or leave it out"
        )
    if max_rows is not None and max_rows < 1:
        raise DataError(f"--max-rows {max_rows} must be at least 1")
    if picture is not None:
        require_picture(picture)
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


def verify_command(splits: Annotated[list[str], typer.Argument(help="Splits to check.")]) -> None:
    """Read every shard and compare sizes, hashes, token ids and counts.

    Examples:
      megatron-eso data verify runs/data/stdlib/train runs/data/stdlib/validation
    """
    from megatron_eso.config.schema import DataConfig
    from megatron_eso.data.verify import verify_split

    for split in splits:
        num_rows = verify_split(split, DataConfig(), typer.echo)
        typer.echo(f"{split}: {num_rows:,} rows are whole")


def merge_command(
    splits: Annotated[
        list[Path], typer.Argument(help="Local splits made with the same tokenizer.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the new split.")],
) -> None:
    """Join splits into one.

    Shards are hard-linked, or copied if --out is on another file system.

    Examples:
      megatron-eso data merge data/a/train data/b/train --out data/both/train
    """
    from megatron_eso.data.combine import merge_splits
    from megatron_eso.data.summary import summary_line

    typer.echo(f"{out}: {summary_line(merge_splits(splits, out))}")


def mix_command(
    config: Annotated[Path, typer.Argument(help="Run configuration.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
) -> None:
    """Print how much a run will take from each of its data sources.

    Reads no rows.

    Examples:
      megatron-eso data mix configs/run/quickstart.yaml train.steps=1000
    """
    from megatron_eso.config.check import check_length
    from megatron_eso.config.derive import total_steps
    from megatron_eso.config.load import load_config
    from megatron_eso.data.combine import mixture_use

    run = load_config(config, overrides or [])
    check_length(run)
    rows = total_steps(run) * run.train.global_batch_rows
    uses = mixture_use(
        run.data, rows, sequence_length=run.train.sequence_length, vocab_size=run.model.vocab_size,
        seed=run.train.seed,
    )  # fmt: skip
    typer.echo(f"{rows:,} rows, {rows * run.train.sequence_length:,} tokens")
    for use in uses:
        typer.echo(
            f"{use.share:8.3%}  {use.num_samples:>12,} rows  {use.epochs:8.2f} epochs  {use.path}"
        )


def convert_command(
    source: Annotated[
        Path, typer.Argument(help="Path of the .bin and .idx files, without these endings.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the new split.")],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.json that encoded the tokens.")],
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens per row, L.")] = 512,
    format_name: Annotated[
        str, typer.Option("--from", help="Format of the files; there is one so far.")
    ] = "megatron-indexed",
) -> None:
    """Turn another framework's token files into a split.

    Examples:
      megatron-eso data convert old/gpt_text_document --out data/new/train --tokenizer t.json
    """
    from megatron_eso.data.megatron_indexed import convert_indexed
    from megatron_eso.data.summary import summary_line
    from megatron_eso.errors import DataError

    if format_name != "megatron-indexed":
        raise DataError(f"--from {format_name} is not known; it must be megatron-indexed")
    manifest = convert_indexed(source, out, tokenizer, sequence_length)
    typer.echo(f"{out}: {summary_line(manifest)}")
