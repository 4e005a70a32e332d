"""``megatron-eso data``: prepare, inspect, verify and combine data sets."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_eso.cli.application import application
from megatron_eso.cli.data_tools import (
    convert_command,
    inspect_command,
    merge_command,
    mix_command,
    verify_command,
)

app = application(
    no_args_is_help=True,
    help="Prepare, inspect, verify and combine data sets.",
)


@app.command("prepare")
def prepare_command(
    sources: Annotated[
        list[str],
        typer.Argument(help="Files, folders, 'stdlib' or 'hf:NAME[@CONFIGURATION][:SPLIT]'."),
    ],
    out: Annotated[str, typer.Option(help="Folder for the data set; also s3:// or gs://.")],
    include: Annotated[
        list[str] | None,
        typer.Option(help="In folders, read only matching files, such as '*.py'; repeatable."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="In folders, skip these, such as '*.csv' or build; repeatable."),
    ] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens per row, L.")] = 512,
    vocab_size: Annotated[
        int | None,
        typer.Option(help="Number of tokens, mask included; required to train a tokenizer."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="tokenizer.json, its folder or a hub name [train one]."),
    ] = None,
    text_key: Annotated[str, typer.Option(help="Key or column that holds the text.")] = "text",
    packing: Annotated[
        str, typer.Option(help="packed, or separate: start each document in a new row.")
    ] = "packed",
    validation_fraction: Annotated[
        float, typer.Option(help="Share of documents to hold out; 0: no validation split.")
    ] = 0.05,
    bad_documents: Annotated[
        str, typer.Option(help="At a bad document: error, or skip and count it.")
    ] = "error",
    shard_mib: Annotated[int, typer.Option(help="Largest size of a shard, MiB.")] = 64,
    compress: Annotated[
        bool, typer.Option(help="Compress shards with zstd, for object stores.")
    ] = False,
    partition_mib: Annotated[
        int | None, typer.Option(min=1, help="Input per unit of work, MiB [2 to 512, by size].")
    ] = None,
    tokenizer_mib: Annotated[
        int | None, typer.Option(min=1, help="Text to train the tokenizer on, MiB [256].")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Worker processes [one per core].")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Remove what is there and start over.")] = False,
    staging: Annotated[
        Path | None,
        typer.Option(help="With s3:// or gs://: folder for work in progress [in the cache]."),
    ] = None,
) -> None:
    """Turn raw text into a tokenizer, a training and a validation split.

    The same command continues an interrupted preparation, and does nothing once it is complete.

    Examples:
      megatron-eso data prepare stdlib --out runs/data/stdlib256 --sequence-length 256 --vocab-size 2048
      megatron-eso data prepare a.jsonl.gz b/ --out data/mine --sequence-length 1024 --vocab-size 32768
      megatron-eso data prepare repo/ --exclude '*.csv' --exclude build --out data/code --vocab-size 32768
      megatron-eso data prepare big/ --out s3://bucket/mine --compress --tokenizer tokenizer.json
    """
    from megatron_eso.data.file_kinds import FileChoice
    from megatron_eso.data.partition import PrepareOptions
    from megatron_eso.data.prepare import prepare
    from megatron_eso.data.progress import Progress
    from megatron_eso.data.sources import require_sources
    from megatron_eso.data.summary import summary_line
    from megatron_eso.data.tokenizer import vocabulary_of
    from megatron_eso.errors import DataError
    from megatron_eso.files import is_remote

    if staging is not None and not is_remote(out):
        raise DataError(
            f"--staging {staging} applies only to object stores (s3://, gs://); the local --out {out} "
            "holds the work in progress itself: leave --staging out"
        )
    if tokenizer is not None and tokenizer_mib is not None:
        raise DataError(
            f"--tokenizer-mib {tokenizer_mib} applies only when a tokenizer is trained, but --tokenizer "
            f"{tokenizer} is given: leave one of them out"
        )
    require_sources(sources)  # before a tokenizer is asked for, or fetched
    if vocab_size is None:
        vocab_size = vocabulary_of(tokenizer)
    options = PrepareOptions(
        sequence_length, vocab_size, text_key, packing, validation_fraction,
        bad_documents, shard_mib, compress, partition_mib,
    )  # fmt: skip
    done = prepare(
        sources, out, options, choice=FileChoice(tuple(include or ()), tuple(exclude or ())),
        tokenizer=tokenizer, tokenizer_bytes=(tokenizer_mib or 256) << 20,
        num_processes=processes, overwrite=overwrite, staging=staging, progress=Progress(),
    )  # fmt: skip
    state = (
        "already prepared, nothing to do (--overwrite prepares it again)"
        if done.was_complete
        else "prepared"
    )
    print(f"{out}: {state}")
    for _, manifest in sorted(done.manifests.items()):
        print(f"  {summary_line(manifest)}")


app.command("inspect")(inspect_command)
app.command("verify")(verify_command)
app.command("merge")(merge_command)
app.command("mix")(mix_command)
app.command("convert")(convert_command)
