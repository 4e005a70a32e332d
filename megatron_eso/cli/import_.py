"""``megatron-eso import``: turn another program's checkpoint into one of ours."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)


class Source(StrEnum):
    """Formats that can be read."""

    OFFICIAL = "official"


class Weights(StrEnum):
    """Which weights of the file."""

    EMA = "ema"
    RAW = "raw"


@app.command()
def import_(
    checkpoint: Annotated[Path, typer.Argument(help="File to read")],
    out: Annotated[Path, typer.Option(help="Folder of the new checkpoint; absent or empty")],
    source: Annotated[
        Source, typer.Option("--from", help="official: Lightning file of the Eso-LM authors' code")
    ] = Source.OFFICIAL,
    weights: Annotated[
        Weights, typer.Option(help="Averaged or raw weights of the file")
    ] = Weights.EMA,
    num_heads: Annotated[int | None, typer.Option(help="Heads [as the file says]")] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens of a row [as the file says]")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json to keep [the one in the file]")
    ] = None,
) -> None:
    """Write a checkpoint that eval, sample and training (checkpoint.init_from) load at any layout.

    Nothing that the file's pickle names is run: only tensors and plain settings are read.

    Examples:
        megatron-eso import --from official official.ckpt --out runs/official
        megatron-eso import --from official official.ckpt --out runs/raw --weights raw
    """
    from dataclasses import asdict

    from megatron_eso.export.import_official import import_official
    from megatron_eso.parallel.finish import finish

    folder, official = import_official(
        checkpoint, out, weights=weights.value, num_heads=num_heads,
        sequence_length=sequence_length, tokenizer=tokenizer,
    )  # fmt: skip
    shape = {k: v for k, v in asdict(official.model).items() if v not in (None, False)}
    count = sum(tensor.numel() for tensor in official.weights.values())
    typer.echo(f"{folder.path}: {weights.value} weights, {count:,} numbers after folding")
    typer.echo("to train on, give megatron-eso train these settings:")
    typer.echo(
        f"  checkpoint.init_from={folder.path} train.sequence_length={official.sequence_length}"
    )
    typer.echo("  " + " ".join(f"model.{name}={value}" for name, value in shape.items()))
    finish()
