"""``megatron-eso bench-sample``: measure the speed of samplers against their quality."""

from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_eso.cli.application import application

app = application()


@app.command()
def bench_sample(
    checkpoints: Annotated[list[Path], typer.Argument(help="Run or checkpoint folders to compare")],
    judge: Annotated[
        Path | None,
        typer.Option(help="Score samples with this AR checkpoint or local Hugging Face model"),
    ] = None,
    steps: Annotated[
        list[int] | None,
        typer.Option(help="Diffusion steps per row of L tokens; repeatable [L, L/4, L/16]"),
    ] = None,
    alpha_0: Annotated[
        list[float] | None,
        typer.Option(help="Eso-LM: share of tokens decided by diffusion; repeatable [as trained]"),
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows to sample for each point")] = 16,
    batch: Annotated[int, typer.Option(help="Rows to sample at once")] = 16,
    length: Annotated[int | None, typer.Option(help="Tokens per row [as trained]")] = None,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; 0 takes the most likely token")
    ] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus probability; 1 allows every token")] = 0.9,
    seed: Annotated[int, typer.Option(help="Seed of all samples")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for frontier.json, .md and .png")] = Path(
        "runs/bench-sample"
    ),
) -> None:
    """Compare samplers: passes, seconds, tokens/s, entropy and, with --judge, perplexity and a plot.

    One process measures the points one after the other. Diffusion methods run with each number of
    steps, Eso-LM also with each alpha_0; AR decides one token at a time.

    Examples:
        megatron-eso bench-sample runs/eso runs/ar runs/mdlm --judge runs/ar --steps 128 --steps 32
    """
    from megatron_eso.cli.model_loading import load
    from megatron_eso.data.output import require_writable
    from megatron_eso.data.tokenizer import decode
    from megatron_eso.eval.frontier import measure, plot, table
    from megatron_eso.parallel.finish import finish
    from megatron_eso.sample.sampler import Choice

    choice = Choice(temperature=temperature, top_p=top_p, seed=seed)
    # Check everything that can be wrong before measuring anything.
    asked = _checked(checkpoints, steps, alpha_0, length, choice, rows=rows, batch=batch)
    require_writable(out, f"to --out {out}")  # files in it stay until the first point
    loaded_judge = None
    if judge is not None:
        longest = max(size for _, size, _ in asked)
        loaded_judge = _judge(judge, [known for known, _, _ in asked], longest)
    points = []
    for checkpoint, (_, size, of_one) in zip(checkpoints, asked, strict=True):
        loaded = load(checkpoint, use_ema=True, dtype="fp32")
        for settings in of_one:
            point = measure(
                loaded.replica, lambda ids, t=loaded.tokenizer: decode(t, ids), settings, choice,
                num_rows=rows, batch_rows=batch, length=size, judge=loaded_judge,
            )  # fmt: skip
            points.append(point)
            _write(out, points)
            typer.echo(
                f"{point.method}, {point.evaluations:.0f} passes: {point.tokens_per_second:,.0f} tokens/s",
                err=True,
            )
    typer.echo(table(points))
    if loaded_judge is not None:
        plot(points, out / "frontier.png")
    typer.echo(f"written to {out}")
    finish()


def _checked(
    checkpoints: list[Path],
    steps: list[int] | None,
    alphas: list[float] | None,
    length: int | None,
    choice: Any,
    *,
    rows: int,
    batch: int,
) -> list[tuple[Any, int, list[Any]]]:
    """Return each checkpoint's description, its tokens per row and its settings, all checked."""
    from megatron_eso.cli.model_loading import describe, tokenizer_of
    from megatron_eso.errors import ConfigError
    from megatron_eso.sample.generate import check_request
    from megatron_eso.sample.prompt import rows_with_prompts

    for name, number in (("--rows", rows), ("--batch", batch)):
        if number < 1:
            raise ConfigError(f"{name} {number} must be at least 1")
    asked = []
    for path in checkpoints:
        known = describe(path)
        tokenizer_of(known)
        size = known.sequence_length if length is None else length
        canvas = rows_with_prompts([[]], size, known.model)
        settings = _settings(known.objective, steps, alphas, size)
        for each in settings:
            check_request(known.objective, canvas, each, choice)
        asked.append((known, size, settings))
    return asked


def _write(out: Path, points: list[Any]) -> None:
    """Write the points measured so far, because a later one may fail."""
    from megatron_eso.eval.frontier import table
    from megatron_eso.files import write_json, write_whole

    write_json(out / "frontier.json", [p.as_dict() for p in points])
    write_whole(out / "frontier.md", table(points) + "\n")


def _settings(
    objective: Any, steps: list[int] | None, alphas: list[float] | None, length: int
) -> list[Any]:
    from megatron_eso.sample.settings import PlanSettings

    if objective.name == "ar":
        return [PlanSettings()]
    numbers = steps or [length, max(length // 4, 1), max(length // 16, 1)]
    shares = (alphas or [objective.alpha_0]) if objective.name == "eso" else [None]
    return [
        PlanSettings(alpha_0=share, num_steps=None if share == 0 else number)
        for share in shares
        for number in (numbers if share != 0 else numbers[:1])
    ]


def _judge(path: Path, samplers: list[Any], longest: int) -> Any:
    """Return the judge; if it is one of our models, its tokenizer must be that of every sampler."""
    from megatron_eso.cli.model_loading import describe, is_exported, load
    from megatron_eso.errors import ConfigError
    from megatron_eso.eval.frontier import hugging_face_judge, our_judge
    from megatron_eso.export.describe import read_facts

    if is_exported(path) and not read_facts(path):  # not one of our models
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError as error:
            raise ConfigError(
                f"--judge {path} is a Hugging Face model; install transformers to load it"
            ) from error
        try:
            model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True).eval()
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--judge {path} cannot be loaded: {error}") from error
        return hugging_face_judge(model, tokenizer)
    shared = _hash(describe(path))
    for known in samplers:
        if _hash(known) != shared:
            raise ConfigError(
                f"{known.path} and the judge {path} have different tokenizers, so the judge cannot "
                "read the samples; train both on the same data set"
            )
    return our_judge(load(path, use_ema=True, dtype="fp32").replica, longest=longest)


def _hash(known: Any) -> str:
    """Return a hash of the tokenizer without its post-processor, in which our exports differ."""
    import hashlib
    import json

    from megatron_eso.data.tokenizer import load_tokenizer
    from megatron_eso.errors import CheckpointError

    if known.tokenizer_file is None:
        raise CheckpointError(
            f"{known.path} has no tokenizer, so it cannot be compared with the others; import it again "
            "with --tokenizer tokenizer.json"
        )
    parts = json.loads(load_tokenizer(known.tokenizer_file).to_str())
    parts.pop("post_processor", None)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
