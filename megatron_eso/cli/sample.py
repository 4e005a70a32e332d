"""``megatron-eso sample``: generate text from a checkpoint."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from megatron_eso.cli.application import application

app = application()


@app.command()
def sample(
    checkpoint: Annotated[Path, typer.Argument(help="Run, checkpoint or exported folder")],
    num_samples: Annotated[int, typer.Option(help="Rows to generate for each prompt")] = 2,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text that rows start with; repeatable")
    ] = None,
    infill: Annotated[
        str | None, typer.Option(help="Text with gaps: [[N]] stands for N tokens")
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per row [as trained]")] = None,
    plan: Annotated[
        str, typer.Option(help="Decoding plan: auto, binomial, fixed, strided or left-to-right")
    ] = "auto",
    alpha_0: Annotated[
        float | None, typer.Option(help="Share of tokens decided by diffusion [as trained]")
    ] = None,
    num_steps: Annotated[
        int | None, typer.Option(help="Number of diffusion steps [as many as tokens]")
    ] = None,
    tokens_per_step: Annotated[
        int | None, typer.Option(help="Tokens per diffusion step, instead of --num-steps")
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; 0 takes the most likely token")
    ] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus probability; 1 allows every token")] = 0.9,
    seed: Annotated[
        int, typer.Option(help="Seed; the same seed gives the same text at any --batch")
    ] = 0,
    batch: Annotated[int, typer.Option(help="Rows to generate at once")] = 16,
    stop_at_end: Annotated[
        bool, typer.Option(help="End a row at its end-of-document token")
    ] = False,
    live: Annotated[bool, typer.Option(help="Show each row as it fills, colored by step")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the samples to this jsonl file")] = None,
    raw_weights: Annotated[
        bool, typer.Option(help="Sample from the raw weights, not their average")
    ] = False,
    dtype: Annotated[
        Literal["fp32", "bf16"],
        typer.Option(help="Number format of the model; bf16 is faster on a GPU"),
    ] = "fp32",
    cuda_graphs: Annotated[
        bool, typer.Option(help="On a GPU, launch the kernels of a step as one CUDA graph")
    ] = True,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks to start on this machine")] = 1,
    tensor: Annotated[int, typer.Option(min=1, help="Ranks that share each layer")] = 1,
    pipeline: Annotated[int, typer.Option(min=1, help="Ranks that hold consecutive layers")] = 1,
) -> None:
    """Generate rows and print them, or write them to a file.

    Takes Eso-LM, AR, MDLM and BD3-LM checkpoints, each with the cache its objective allows.

    Examples:
        megatron-eso sample runs/quickstart
        megatron-eso sample runs/quickstart --prompt "def main(" --alpha-0 0 --num-samples 4
        megatron-eso sample runs/quickstart --infill "def add(a, b):[[12]]return total" --live
        megatron-eso sample runs/quickstart --num-samples 1000 --tokens-per-step 8 --out samples.jsonl
    """
    from megatron_eso.errors import ConfigError
    from megatron_eso.sample.settings import PlanSettings, check_settings

    settings = PlanSettings(cast("Any", plan), alpha_0, num_steps, tokens_per_step)
    check_settings(settings)
    if infill is not None and (prompt or length is not None):
        raise ConfigError("--infill gives the whole row; --prompt and --length do not apply")
    for name, number in (("batch", batch), ("num-samples", num_samples), ("length", length)):
        if number is not None and number < 1:
            raise ConfigError(f"--{name} {number} must be at least 1")
    if out is not None and live:
        raise ConfigError("--live draws in the terminal, --out writes a file: give one of them")
    if live and "RANK" not in os.environ and not sys.stdout.isatty():
        raise ConfigError(
            "--live draws in a terminal, but the output does not go to one; leave --live out"
        )
    for name, texts in (("prompt", prompt or []), ("infill", [infill or ""])):
        _require_text(name, texts)
    _require_ranks(ranks, tensor, pipeline)
    if ranks > 1 and "RANK" not in os.environ:
        from megatron_eso.launch.local import start_ranks

        preload = ["megatron_eso.cli.model_loading", "megatron_eso.sample.generate"]
        raise SystemExit(start_ranks(ranks, sys.argv[1:], preload))

    from megatron_eso.cli.model_loading import describe, load, tokenizer_of
    from megatron_eso.garbage import look_at_new_objects
    from megatron_eso.parallel.finish import finish
    from megatron_eso.sample.generate import check_request
    from megatron_eso.sample.output import require_new
    from megatron_eso.sample.sampler import Choice

    # Check everything that can be wrong before reading weights.
    known = describe(checkpoint)
    tokenizer = tokenizer_of(known)
    canvas = _canvas(known, tokenizer, prompt or [""], infill, num_samples, length)
    choice = Choice(temperature=temperature, top_p=top_p, seed=seed, cuda_graphs=cuda_graphs)
    if stop_at_end:
        choice.stop_token = _end_token(tokenizer)
    check_request(known.objective, canvas, settings, choice)
    if out is not None:
        require_new(out)
    loaded = load(
        checkpoint, use_ema=not raw_weights, dtype=dtype, tensor=tensor, pipeline=pipeline
    )
    look_at_new_objects()
    _run(loaded, canvas, settings, choice, batch=1 if live else batch, live=live, out=out)
    finish()


def _require_ranks(ranks: int, tensor: int, pipeline: int) -> None:
    """Refuse a layout that does not use every rank, whether a launcher or this command starts them."""
    from megatron_eso.errors import ConfigError
    from megatron_eso.launch.environment import Ranks

    needed = tensor * pipeline
    is_launched = "RANK" in os.environ
    given = Ranks.from_environment(os.environ).world_size if is_launched else ranks
    if needed != given:
        advice = (
            f"the launcher started {given} (WORLD_SIZE): let it start {needed}, or change the layout"
            if is_launched
            else f"--ranks is {given}: set --ranks {needed}"
        )
        raise ConfigError(
            f"--tensor {tensor} x --pipeline {pipeline} = {needed} ranks are needed, but {advice}"
        )


def _require_text(option: str, texts: list[str]) -> None:
    """Refuse texts that the shell passed as bytes that are not valid text."""
    from megatron_eso.errors import ConfigError

    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"--{option} {text!r} holds bytes that are not UTF-8; convert the text, for example with "
                "iconv"
            ) from None


def _canvas(
    known: Any,
    tokenizer: Any,
    prompts: list[str],
    infill: str | None,
    num_samples: int,
    length: int | None,
) -> Any:
    from megatron_eso.sample.prompt import rows_with_gaps, rows_with_prompts

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids if text else []

    if infill is not None:
        return rows_with_gaps(infill, num_samples, known.model, encode)
    ids = [encode(text) for text in prompts for _ in range(num_samples)]
    return rows_with_prompts(ids, length or known.sequence_length, known.model)


def _run(
    loaded: Any,
    canvas: Any,
    settings: Any,
    choice: Any,
    *,
    batch: int,
    live: bool,
    out: Path | None,
) -> None:
    import time
    from contextlib import ExitStack

    import torch.distributed as dist

    from megatron_eso.data.tokenizer import decode
    from megatron_eso.sample.generate import generate
    from megatron_eso.sample.output import SampleFile

    is_first = dist.get_rank() == 0
    begin, done, evaluations, tokens = time.perf_counter(), 0, 0, 0
    with ExitStack() as stack:
        file = None
        if out is not None and is_first:
            file = stack.enter_context(SampleFile(out, total=len(canvas.tokens)))
        watch = _watch(loaded, canvas, choice, stack) if live and is_first else lambda plan: None
        for part in generate(
            loaded.replica, canvas, settings, choice, batch_rows=batch, on_plan=watch
        ):
            evaluations += part.sampled.num_steps
            decided = part.plan.counts[
                : part.sampled.num_steps
            ]  # fewer steps than planned if all rows ended early
            tokens += int(sum(decided)) * len(part.padding)
            for ids in part.token_rows(choice.stop_token):
                text = decode(loaded.tokenizer, ids)
                if file is not None:
                    steps = part.sampled.num_steps
                    file.add(sample=done, seed=choice.seed, nfe=steps, text=text, tokens=ids)
                elif is_first and not live:
                    typer.echo(f"--- sample {done + 1} of {len(canvas.tokens)} ---\n{text}")
                done += 1
    seconds = time.perf_counter() - begin
    if is_first:
        typer.echo(
            f"--- {tokens} tokens in {evaluations} evaluations, {seconds:.1f} s, "
            f"{tokens / seconds:,.0f} tokens/s, step {loaded.step} ({loaded.kind})"
        )


def _watch(loaded: Any, canvas: Any, choice: Any, stack: Any) -> Any:
    """Return a callback that draws the rows, one after the other, as they fill."""
    from rich.console import Console

    from megatron_eso.sample.live import LiveRow

    console, rows = Console(), zip(canvas.tokens, canvas.padding.tolist(), strict=True)
    drawn: list[LiveRow] = []
    choice.on_step = lambda step, tokens: drawn[-1].on_step(step, tokens)

    def begin(plan: Any) -> None:
        stack.close()  # end the picture of the previous row
        mask_id = loaded.replica.config.model.vocab_size - 1
        drawn.append(LiveRow(console, loaded.tokenizer, plan.num_evaluations, mask_id))
        stack.enter_context(drawn[-1]).begin(*next(rows))

    return begin


def _end_token(tokenizer: Any) -> int:
    from megatron_eso.data.tokenizer import END_NAMES
    from megatron_eso.errors import ConfigError

    known = (tokenizer.token_to_id(name) for name in END_NAMES)
    end = next((token for token in known if token is not None), None)
    if end is None:
        raise ConfigError(
            "--stop-at-end: the tokenizer has no end-of-document token; leave --stop-at-end out"
        )
    return end
