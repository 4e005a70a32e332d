"""``megatron-eso verify``: does a model equal the one it was made from, or that of the official code?"""

from pathlib import Path
from typing import Annotated

import typer

from megatron_eso.cli.application import application

app = application()


@app.command()
def verify(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="Exported folder, imported checkpoint, or the official file itself"),
    ],
    expected: Annotated[
        Path | None, typer.Option(help="safetensors file of the official code's log-probabilities")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="Checkpoint that an exported folder was made from [as recorded in it]"),
    ] = None,
    tensor: Annotated[int, typer.Option(help="Ranks that share each layer; needs a launcher")] = 1,
    pipeline: Annotated[
        int, typer.Option(help="Ranks that hold consecutive layers; needs a launcher")
    ] = 1,
) -> None:
    """Compare an export with its source, or a checkpoint with the official code.

    An exported folder is compared with its source in float32. With --expected a checkpoint is compared
    with the official code (diffusion pass, sequential pass, exact likelihood, cached sampler; limit 1e-4
    nats). Prints the differences; exit code 1 if one is above its limit.

    Examples:
        megatron-eso verify exported
        megatron-eso verify exported --against runs/quickstart
        megatron-eso verify runs/official --expected expected.safetensors
        torchrun --nproc-per-node 2 -m megatron_eso verify runs/official --expected e.safetensors --tensor 2
    """
    _require_effect(expected is not None, against is not None, tensor * pipeline > 1)
    if expected is None:
        _verify_export(checkpoint, against)
    else:
        _verify_official(checkpoint, expected, tensor, pipeline)


def _require_effect(has_expected: bool, has_against: bool, has_layout: bool) -> None:
    """Refuse options that belong to the other comparison."""
    from megatron_eso.errors import ConfigError

    if has_expected and has_against:
        raise ConfigError(
            "--against names the source of an exported folder, --expected the official code's numbers: "
            "give one of them"
        )
    if has_layout and not has_expected:
        raise ConfigError(
            "--tensor and --pipeline apply only to --expected; one process reads an exported folder"
        )


def _verify_export(folder: Path, against: Path | None) -> None:
    from dataclasses import asdict

    from megatron_eso.export.verify_export import verify_folder

    found = verify_folder(folder, against)
    for name, value in asdict(found).items():
        typer.echo(f"{name} = {value:.3g}")
    failures = found.failures()
    typer.echo("equal" if not failures else "DIFFERENT: " + "; ".join(failures))
    if failures:
        raise typer.Exit(1)


def _verify_official(checkpoint: Path, expected: Path, tensor: int, pipeline: int) -> None:
    import tempfile
    from contextlib import ExitStack

    import torch.distributed as dist

    from megatron_eso.cli.model_loading import load
    from megatron_eso.eval.verify import TOLERANCE, read_expected
    from megatron_eso.eval.verify import verify as compare
    from megatron_eso.export.import_official import import_official
    from megatron_eso.parallel.finish import finish

    with ExitStack() as held:
        if checkpoint.is_file():
            scratch = held.enter_context(tempfile.TemporaryDirectory())
            checkpoint = import_official(checkpoint, Path(scratch) / "imported")[0].path
        loaded = load(
            checkpoint, use_ema=True, dtype="fp32", tensor=tensor, pipeline=pipeline,
            with_tokenizer=False,
        )  # fmt: skip
    cases = read_expected(expected, loaded.replica.config.model.vocab_size)
    found = compare(loaded.replica, cases)
    is_first = dist.get_rank() == 0
    finish()
    is_same = all(d.largest is None or d.largest <= TOLERANCE for d in found)
    if is_first:
        for d in found:
            result = "left out (needs sequence=false)" if d.largest is None else f"{d.largest:.2e}"
            typer.echo(f"{d.case:<12}{result}  ({d.compared:,} numbers)")
        typer.echo("equal" if is_same else f"DIFFERENT: above {TOLERANCE:g} nats")
    if not is_same:
        raise typer.Exit(1)
