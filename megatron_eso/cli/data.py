"""``megatron-eso data``: prepare and inspect data sets."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Prepare, inspect and verify data sets.",
)  # fmt: skip


@app.command()
def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(help="Text or jsonl files, folders, or 'stdlib' (this Python's own)"),
    ],
    out: Annotated[Path, typer.Option(help="Folder for tokenizer.json, train/ and validation/")],
    sequence_length: Annotated[int, typer.Option(help="Tokens of a row")] = 512,
    vocab_size: Annotated[
        int | None, typer.Option(help="Ids of the tokenizer to train, the mask included")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Use this tokenizer.json instead of training one")
    ] = None,
    validation_fraction: Annotated[float, typer.Option(help="Share of documents held out")] = 0.05,
    overwrite: Annotated[
        bool, typer.Option(help="Replace a folder made with other settings")
    ] = False,
) -> None:
    """Tokenize text into MDS shards, split by document into train and validation.

    Examples:
        megatron-eso data prepare stdlib --out runs/data/stdlib --vocab-size 4096
        megatron-eso data prepare books/ more.jsonl --out data/books --tokenizer gpt2/tokenizer.json
    """
    from megatron_eso.data.prepare import Request
    from megatron_eso.data.prepare import prepare as run
    from megatron_eso.errors import DataError

    if (vocab_size is None) == (tokenizer is None):
        raise DataError("give exactly one of --vocab-size and --tokenizer")
    if not 0 < validation_fraction < 1:
        raise DataError(f"--validation-fraction {validation_fraction} must be between 0 and 1")
    request = Request(tuple(sources), sequence_length, vocab_size, tokenizer, validation_fraction)
    run(request, out, say=typer.echo, overwrite=overwrite)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A split: .../train or .../validation")],
) -> None:
    """Print a split's manifest and the text of its first sample."""
    import dataclasses

    import numpy as np

    from megatron_eso.data.shards import ShardedTokens
    from megatron_eso.data.tokenizer import decode, load_tokenizer

    shards = ShardedTokens(folder, verify_hashes=True)
    for name, value in dataclasses.asdict(shards.manifest).items():
        typer.echo(f"{name:20} {value}")
    text = decode(
        load_tokenizer(folder.parent / "tokenizer.json"), shards.read(np.array([0]))[0].tolist()
    )
    typer.echo(f"\nfirst sample:\n{text}")


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A split: .../train or .../validation")],
) -> None:
    """Read every shard of a split and compare its size, hash and token ids."""
    import numpy as np

    from megatron_eso.data.shards import ShardedTokens

    shards = ShardedTokens(folder, verify_hashes=True)
    for first in range(0, len(shards), 1024):
        shards.read(np.arange(first, min(first + 1024, len(shards))))
    typer.echo(f"{folder}: {len(shards)} samples in {len(shards.shard_sizes)} shards are whole")
