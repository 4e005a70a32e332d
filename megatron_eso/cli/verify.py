"""``megatron-eso verify``: is this model the one the official code computed with?"""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def verify(
    checkpoint: Annotated[
        Path, typer.Argument(help="Imported checkpoint, or the official file itself")
    ],
    expected: Annotated[
        Path, typer.Option(help="safetensors file of the official code's log-probabilities")
    ],
    tensor: Annotated[int, typer.Option(help="Tensor ranks, under a launcher")] = 1,
    pipeline: Annotated[int, typer.Option(help="Pipeline ranks, under a launcher")] = 1,
) -> None:
    """Print the largest difference of each case; exit code 1 if one is above 1e-4 nats.

    Cases: diffusion pass, sequential pass, exact likelihood, cached sampler.

    Examples:
        megatron-eso verify runs/official --expected expected.safetensors
        megatron-eso verify official.ckpt --expected expected.safetensors
        torchrun --nproc-per-node 2 -m megatron_eso verify runs/official --expected e.safetensors --tensor 2
    """
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
