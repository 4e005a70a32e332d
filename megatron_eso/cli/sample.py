"""``megatron-eso sample``: generate text from a checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def sample(
    checkpoint: Annotated[Path, typer.Argument(help="Run folder or checkpoint folder")],
    num_samples: Annotated[int, typer.Option(help="Rows to generate")] = 2,
    prompt: Annotated[str, typer.Option(help="Text the rows start with")] = "",
    length: Annotated[int | None, typer.Option(help="Tokens of a row [as trained]")] = None,
    alpha_0: Annotated[
        float | None, typer.Option(help="Share of tokens by diffusion [as trained]")
    ] = None,
    num_steps: Annotated[
        int | None, typer.Option(help="Diffusion steps [as many as tokens]")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0: the most likely token")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus; 1: all tokens")] = 0.9,
    seed: Annotated[int, typer.Option(help="Same seed, same text")] = 0,
    raw_weights: Annotated[bool, typer.Option(help="Not the moving average")] = False,
) -> None:
    """Generate rows with the cached sampler and print them.

    Examples:
        megatron-eso sample runs/quickstart
        megatron-eso sample runs/quickstart --prompt "def main(" --alpha-0 0 --num-samples 4
    """
    import time

    import torch

    from megatron_eso.cli.model_loading import load
    from megatron_eso.data.tokenizer import decode
    from megatron_eso.parallel.finish import finish
    from megatron_eso.sample.plan import make_plan
    from megatron_eso.sample.prompt import rows_with_prompt
    from megatron_eso.sample.sampler import Choice, fill_rows

    loaded = load(checkpoint, use_ema=not raw_weights, dtype="fp32")
    config = loaded.replica.config
    ids = loaded.tokenizer.encode(prompt, add_special_tokens=False).ids if prompt else []
    rows, is_given = rows_with_prompt(
        ids, num_samples, length or config.train.sequence_length, config.model
    )
    left = rows.shape[1] - len(ids)
    plan = make_plan(
        is_given,
        alpha_0=config.objective.alpha_0 if alpha_0 is None else alpha_0,
        num_steps=num_steps or left,
        seed=seed,
    )
    begin = time.perf_counter()
    choice = Choice(temperature=temperature, top_p=top_p, seed=seed)
    result = fill_rows(loaded.replica, rows, plan, choice)
    seconds = time.perf_counter() - begin
    for number, row in enumerate(torch.as_tensor(result.tokens).tolist(), start=1):
        typer.echo(f"--- sample {number} of {num_samples} ---")
        typer.echo(decode(loaded.tokenizer, row))
    tokens = num_samples * left
    typer.echo(
        f"--- {tokens} tokens in {plan.num_evaluations} evaluations, {seconds:.1f} s, "
        f"{tokens / seconds:,.0f} tokens/s, step {loaded.folder.step} ({loaded.kind})"
    )
    finish()
