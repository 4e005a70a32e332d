"""``megatron-eso bench-sample``: speed against quality of samplers."""

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def bench_sample(
    checkpoints: Annotated[list[Path], typer.Argument(help="Run or checkpoint folders to compare")],
    judge: Annotated[
        Path | None, typer.Option(help="AR checkpoint of ours, or a local Hugging Face model")
    ] = None,
    steps: Annotated[
        list[int] | None, typer.Option(help="Diffusion steps; repeat it [L, L/4, L/16]")
    ] = None,
    alpha_0: Annotated[
        list[float] | None, typer.Option(help="For Eso-LM; repeat it [as trained]")
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows per point")] = 16,
    batch: Annotated[int, typer.Option(help="Rows at once")] = 16,
    length: Annotated[int | None, typer.Option(help="Tokens of a row [as trained]")] = None,
    temperature: Annotated[float, typer.Option(help="0: the most likely token")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus; 1: all tokens")] = 0.9,
    seed: Annotated[int, typer.Option(help="Seed of all samples")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for frontier.json, .md and .png")] = Path(
        "runs/bench-sample"
    ),
) -> None:
    """Print passes, seconds, tokens/s, entropy and judge perplexity of every method; plot them.

    Points are measured one after the other on one process. Diffusion methods take each number of
    steps, AR one token at a time; Eso-LM each alpha_0 too.

    Examples:
        megatron-eso bench-sample runs/eso runs/ar runs/mdlm --judge runs/ar --steps 128 --steps 32
    """
    import json

    from megatron_eso.cli.model_loading import load
    from megatron_eso.data.tokenizer import decode
    from megatron_eso.eval.frontier import measure, plot, table
    from megatron_eso.parallel.finish import finish
    from megatron_eso.sample.sampler import Choice

    choice = Choice(temperature=temperature, top_p=top_p, seed=seed)
    loaded_judge, shared = None, None
    if judge is not None:
        loaded_judge, shared = _judge(judge)
    points = []
    for checkpoint in checkpoints:
        loaded = load(checkpoint, use_ema=True, dtype="fp32")
        _check_tokenizer(loaded, shared, judge)
        size = length or loaded.replica.config.train.sequence_length
        for settings in _settings(loaded.replica.config.objective, steps, alpha_0, size):
            point = measure(
                loaded.replica, lambda ids, t=loaded.tokenizer: decode(t, ids), settings, choice,
                num_rows=rows, batch_rows=batch, length=size, judge=loaded_judge,
            )  # fmt: skip
            points.append(point)
            typer.echo(
                f"{point.method}, {point.evaluations:.0f} passes: {point.tokens_per_second:,.0f} tokens/s",
                err=True,
            )
    out.mkdir(parents=True, exist_ok=True)
    (out / "frontier.json").write_text(json.dumps([p.as_dict() for p in points], indent=1) + "\n")
    (out / "frontier.md").write_text(table(points) + "\n")
    typer.echo(table(points))
    if loaded_judge is not None:
        plot(points, out / "frontier.png")
    typer.echo(f"written to {out}")
    finish()


def _settings(
    objective: Any, steps: list[int] | None, alphas: list[float] | None, length: int
) -> list[Any]:
    from megatron_eso.sample.generate import PlanSettings

    if objective.name == "ar":
        return [PlanSettings()]
    numbers = steps or [length, max(length // 4, 1), max(length // 16, 1)]
    shares = (alphas or [objective.alpha_0]) if objective.name == "eso" else [None]
    return [
        PlanSettings(alpha_0=share, num_steps=None if share == 0 else number)
        for share in shares
        for number in (numbers if share != 0 else numbers[:1])
    ]


def _judge(path: Path) -> tuple[Any, str | None]:
    """Return the judge, and the tokenizer's hash if the samples must share it."""
    from megatron_eso.cli.model_loading import is_exported, load
    from megatron_eso.errors import ConfigError
    from megatron_eso.eval.frontier import hugging_face_judge, our_judge

    if is_exported(path):
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError as error:
            raise ConfigError(
                f"--judge {path} is a Hugging Face model; install transformers to load it"
            ) from error
        model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        return hugging_face_judge(model, tokenizer), None
    loaded = load(path, use_ema=True, dtype="fp32")
    return our_judge(loaded.replica), _hash(loaded)


def _check_tokenizer(loaded: Any, shared: str | None, judge: Path | None) -> None:
    from megatron_eso.errors import ConfigError

    if shared is not None and _hash(loaded) != shared:
        raise ConfigError(
            f"{loaded.path} and the judge {judge} have different tokenizers, so the judge cannot "
            "read its samples; train them on one data set"
        )


def _hash(loaded: Any) -> str:
    from megatron_eso.data.manifest import sha256_of

    return sha256_of(loaded.tokenizer_file)
