"""``megatron-eso export``: write a checkpoint as a folder that transformers can load."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from megatron_eso.cli.application import application

app = application()


class Format(StrEnum):
    """What the folder is for."""

    ESOLM = "esolm"
    BACKBONE = "backbone"


class Dtype(StrEnum):
    """Number format of the exported weights."""

    FP32 = "fp32"
    BF16 = "bf16"


@app.command()
def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint folder, or a run folder (its newest one)")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; absent or empty")],
    dtype: Annotated[
        Dtype, typer.Option(help="Number format of the weights; fp32 loses nothing")
    ] = Dtype.FP32,
    format: Annotated[
        Format,
        typer.Option(
            help="esolm: a model class of its own; backbone: stock Llama or Qwen3 (see the model card)"
        ),
    ] = Format.ESOLM,
    raw_weights: Annotated[
        bool, typer.Option(help="Export the raw weights, not their average")
    ] = False,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json to include [the run's]")
    ] = None,
    verify: Annotated[
        bool, typer.Option(help="Compare the result with an independent forward pass in float32")
    ] = True,
    watch: Annotated[
        bool, typer.Option(help="Export each new checkpoint of a run to OUT/step_N until stopped")
    ] = False,
    push: Annotated[
        str | None, typer.Option(help="Also upload to this Hugging Face repository (OWNER/NAME)")
    ] = None,
) -> None:
    """Write a checkpoint as a Hugging Face folder that transformers loads.

    The folder holds safetensors, configs, tokenizer, model files and a model card. Needs no GPU and no
    process group.

    Examples:
        megatron-eso export runs/quickstart --out exported
        megatron-eso export runs/quickstart --out exported --dtype bf16 --raw-weights
        megatron-eso export runs/quickstart --out exports --watch
    """
    from megatron_eso.export.exporter import export as write
    from megatron_eso.export.watch import push_folder, watch_run

    def one(source: Path, target: Path) -> None:
        facts = write(
            source, target, dtype=dtype.value, kind=format.value, use_ema=not raw_weights,
            tokenizer=tokenizer, verify=verify, progress=_bar,
        )  # fmt: skip
        typer.echo(
            f"{target}: step {facts['step']} ({facts['weights']}), {facts['num_parameters']:,} parameters "
            f"in {facts['num_tensors']} tensors"
        )
        for name, value in facts["verification"].items():
            typer.echo(f"  {name} = {value:.3g}")
        for remark in facts["remarks"]:
            typer.echo(remark)
        if push is not None:
            typer.echo(f"pushed to {push_folder(target, push)}")

    if watch:
        watch_run(checkpoint, out, one)
    else:
        one(checkpoint, out)


def _bar(done: int, total: int) -> None:
    """Show the progress of writing, only on a terminal."""
    import sys

    if sys.stderr.isatty():
        filled = 40 * done // max(total, 1)
        end = "\n" if done >= total else ""
        print(
            f"\r[{'#' * filled:<40}] {done / 1e6:,.0f} of {total / 1e6:,.0f} MB",
            end=end,
            file=sys.stderr,
        )
