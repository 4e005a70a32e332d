"""``megatron-eso import``: turn another program's weights into one of our checkpoints."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_eso.cli.application import application

app = application()


class Source(StrEnum):
    """Formats that can be read."""

    OFFICIAL = "official"
    HF = "hf"


class Weights(StrEnum):
    """Which of the file's weights to take."""

    EMA = "ema"
    RAW = "raw"


@app.command()
def import_(
    checkpoint: Annotated[Path, typer.Argument(help="File (official) or folder (hf) to read")],
    out: Annotated[Path, typer.Option(help="Folder of the new checkpoint; absent or empty")],
    source: Annotated[
        Source,
        typer.Option(
            "--from",
            help="official: Lightning file of the Eso-LM authors' code; hf: Llama, Qwen3 or our own export",
        ),
    ] = Source.OFFICIAL,
    weights: Annotated[
        Weights | None,
        typer.Option(help="official: take the file's averaged (ema) or raw weights [ema]"),
    ] = None,
    num_heads: Annotated[
        int | None, typer.Option(help="official: number of heads [as the file says]", min=1)
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens per row [as the file says]", min=1)
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json to keep [the file's or folder's]")
    ] = None,
    cut_vocabulary: Annotated[
        bool, typer.Option(help="hf: drop embedding rows beyond the tokenizer's ids")
    ] = False,
) -> None:
    """Turn other weights into a checkpoint for eval, sample and training (checkpoint.init_from).

    The checkpoint loads at any layout. No code of the file is run: only tensors and plain settings are
    read from its pickle.

    Examples:
        megatron-eso import --from official official.ckpt --out runs/official
        megatron-eso import --from official official.ckpt --out runs/raw --weights raw
        megatron-eso import --from hf Qwen3-0.6B --out runs/qwen3 --cut-vocabulary
    """
    from megatron_eso.errors import ConfigError

    given = {"weights": weights, "num_heads": num_heads, "cut_vocabulary": cut_vocabulary}
    _require_of_format(source, [name for name, value in given.items() if value])
    if source is Source.OFFICIAL and checkpoint.is_dir():
        raise ConfigError(
            f"{checkpoint} is a folder, but --from official reads a Lightning file; read a Hugging Face "
            "folder with --from hf"
        )
    if source is Source.HF:
        _from_hf(checkpoint, out, cut_vocabulary, sequence_length, tokenizer)
    else:
        weights = Weights.EMA if weights is None else weights
        _from_official(checkpoint, out, weights, num_heads, sequence_length, tokenizer)


def _require_of_format(source: Source, given: list[str]) -> None:
    """Refuse options of the other format: silently ignored, they would seem to have been followed."""
    from megatron_eso.errors import ConfigError

    meant = {
        "weights": (Source.OFFICIAL, "whose file holds averaged and raw weights"),
        "num_heads": (Source.OFFICIAL, "for files without a configuration"),
        "cut_vocabulary": (Source.HF, "for embeddings with rows beyond the tokenizer's ids"),
    }
    wrong = [
        f"--{name.replace('_', '-')} is an option of --from {meant[name][0].value}, {meant[name][1]}"
        for name in given
        if meant[name][0] is not source
    ]
    if wrong:
        raise ConfigError(f"with --from {source.value} leave out:\n  - " + "\n  - ".join(wrong))


def _from_hf(
    source: Path,
    out: Path,
    cut_vocabulary: bool,
    sequence_length: int | None,
    tokenizer: Path | None,
) -> None:
    from megatron_eso.export.import_hf import import_hf

    found = import_hf(
        source, out, cut_vocabulary=cut_vocabulary, sequence_length=sequence_length,
        tokenizer=tokenizer,
    )  # fmt: skip
    typer.echo(
        f"{found.folder.path}: {found.num_parameters:,} parameters; the mask token, id "
        f"{found.model.vocab_size - 1}, " + ("was there already" if found.has_mask else "is new")
    )
    for remark in found.remarks:
        typer.echo(remark)
    _print_settings(found.folder, found.sequence_length, found.model)


def _from_official(
    checkpoint: Path,
    out: Path,
    weights: Weights,
    num_heads: int | None,
    sequence_length: int | None,
    tokenizer: Path | None,
) -> None:
    from megatron_eso.export.import_official import import_official
    from megatron_eso.parallel.finish import finish

    folder, official = import_official(
        checkpoint, out, weights=weights.value, num_heads=num_heads,
        sequence_length=sequence_length, tokenizer=tokenizer,
    )  # fmt: skip
    count = sum(tensor.numel() for tensor in official.weights.values())
    typer.echo(f"{folder.path}: {weights.value} weights, {count:,} numbers after folding")
    _print_settings(folder, official.sequence_length, official.model)
    finish()


def _print_settings(folder: Any, sequence_length: int, model: Any) -> None:
    """Print the settings that continue training."""
    from dataclasses import asdict

    from megatron_eso.config.schema import ObjectiveConfig

    shape = {k: v for k, v in asdict(model).items() if v not in (None, False)}
    objective = folder.sidecar().get("objective") or {}
    usual = asdict(ObjectiveConfig())
    changed = {k: v for k, v in objective.items() if k == "name" or v != usual.get(k)}
    typer.echo("to continue training, give megatron-eso train these settings:")
    typer.echo(f"  checkpoint.init_from={folder.path} train.sequence_length={sequence_length}")
    typer.echo("  " + " ".join(f"model.{name}={value}" for name, value in shape.items()))
    if changed:
        typer.echo("  " + " ".join(f"objective.{name}={value}" for name, value in changed.items()))
