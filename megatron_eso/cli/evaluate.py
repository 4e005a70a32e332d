"""``megatron-eso eval``: score held-out data with a checkpoint."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_eso.cli.application import application

app = application()


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Run, checkpoint or exported folder")],
    data: Annotated[
        str,
        typer.Argument(help="Prepared split (.../validation), or any text, jsonl or parquet file"),
    ],
    metric: Annotated[str, typer.Option(help="What to compute: nelbo, likelihood or all")] = "all",
    orders: Annotated[
        int | None, typer.Option(help="Orders K of the likelihood bound; 0 leaves it out [1]")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(help="Draws of times and masks per row for the NELBO [1]")
    ] = None,
    eps: Annotated[
        float | None, typer.Option(help="Lowest time of the NELBO [0: unbiased]")
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows to score; 0: all")] = 0,
    alpha_0: Annotated[
        float | None, typer.Option(help="alpha_0 to score with [as trained]")
    ] = None,
    text_key: Annotated[
        str | None, typer.Option(help="Key or column of the text in jsonl, parquet or arrow [text]")
    ] = None,
    bad_documents: Annotated[
        str | None,
        typer.Option(help="At a bad document of raw text: error, or skip and count it [error]"),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json for raw text [the checkpoint's]")
    ] = None,
    raw_weights: Annotated[
        bool, typer.Option(help="Score the raw weights, not their average")
    ] = False,
    batch: Annotated[int, typer.Option(help="Stack rows to score at once")] = 16,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks to start on this machine")] = 1,
    tensor: Annotated[int, typer.Option(min=1, help="Ranks that share each layer")] = 1,
    pipeline: Annotated[int, typer.Option(min=1, help="Ranks that hold consecutive layers")] = 1,
    context: Annotated[
        int, typer.Option(min=1, help="Ranks that share each row; other ranks are data-parallel")
    ] = 1,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the scores to this JSON file")
    ] = None,
) -> None:
    """Print the NELBO and the exact-likelihood bound of held-out rows.

    Raw text is encoded with the checkpoint's tokenizer and packed into rows of the trained length.

    Examples:
        megatron-eso eval runs/quickstart runs/data/stdlib/validation --orders 4
        megatron-eso eval runs/quickstart my_notes.txt --metric likelihood --orders 100 --json scores.json
        megatron-eso eval runs/quickstart runs/data/stdlib/validation --ranks 2 --tensor 2
    """
    from dataclasses import replace

    from megatron_eso.config.check import check_ranges
    from megatron_eso.config.schema import EvalConfig, RunConfig

    settings = EvalConfig(
        likelihood_orders=1 if orders is None else orders, alpha_0=alpha_0, micro_batch_rows=batch,
        nelbo_repeats=1 if repeats is None else repeats, noise_eps=0.0 if eps is None else eps,
    )  # fmt: skip
    # Check everything that can be wrong before reading weights.
    drawn = {"orders": orders, "repeats": repeats, "eps": eps}
    _check_numbers(metric, drawn, rows=rows, batch=batch)
    check_ranges(RunConfig(eval=settings), "eval")
    is_prepared = _check_data(data, tokenizer, text_key, bad_documents)
    if json_file is not None and os.environ.get("RANK", "0") == "0":  # rank 0 writes the file
        _check_writable(json_file)
    if ranks > 1 and "RANK" not in os.environ:
        from megatron_eso.launch.local import start_ranks

        preload = ["megatron_eso.cli.model_loading", "megatron_eso.eval.evaluate"]
        raise SystemExit(start_ranks(ranks, sys.argv[1:], preload))

    import torch
    import torch.distributed as dist

    from megatron_eso.cli.model_loading import describe, load
    from megatron_eso.eval.evaluate import METRICS, check_request
    from megatron_eso.eval.evaluate import evaluate as run
    from megatron_eso.garbage import look_at_new_objects
    from megatron_eso.parallel.exchange import Rows
    from megatron_eso.parallel.finish import finish

    metrics = METRICS if metric == "all" else [metric]
    objective = describe(checkpoint).objective
    check_request(objective, metrics, alpha_0)
    _say_what_is_unused(objective, settings, drawn)
    loaded = load(
        checkpoint, use_ema=not raw_weights, dtype="fp32", tensor=tensor, pipeline=pipeline,
        context=context, with_tokenizer=False,
    )  # fmt: skip
    look_at_new_objects()
    config = replace(loaded.replica.config, eval=settings)
    raw = {"text_key": text_key, "max_rows": rows, "skips_bad": bad_documents == "skip"}
    reader = _reader(data, loaded, tokenizer, config, None if is_prepared else raw)

    def read(numbers: list[int]) -> Rows:
        got = reader.read(numbers)
        return Rows(torch.from_numpy(got.tokens), torch.from_numpy(got.is_valid))

    count = min(rows or reader.num_rows, reader.num_rows)
    scores = run(
        replace(loaded.replica, config=config), read, num_rows=count,
        bytes_per_token=reader.bytes_per_token, metrics=metrics,
    )  # fmt: skip
    if dist.get_rank() == 0:
        num_skipped = reader.num_skipped if bad_documents == "skip" else None
        title = f"{loaded.path} ({loaded.kind}) on {data}: {count} rows"
        _report(scores, title, json_file, num_skipped)
    finish()


def _check_numbers(metric: str, drawn: dict[str, Any], *, rows: int, batch: int) -> None:
    """Refuse meaningless numbers, and draws for a metric that is not requested."""
    from megatron_eso.errors import ConfigError

    if rows < 0:
        raise ConfigError(f"--rows {rows} must be at least 0; 0 scores all rows")
    if batch < 1:
        raise ConfigError(f"--batch {batch} must be at least 1")
    for other, names, of in (
        ("nelbo", ["orders"], "likelihood bound"),
        ("likelihood", ["repeats", "eps"], "NELBO"),
    ):
        for name in names:
            if metric == other and drawn[name] is not None:
                raise ConfigError(
                    f"--{name} {drawn[name]} applies to the {of}, which --metric {metric} does not "
                    f"compute; leave --{name} out, or use --metric all"
                )
    if metric == "likelihood" and drawn["orders"] is not None and drawn["orders"] < 1:
        raise ConfigError(
            f"--orders {drawn['orders']} leaves nothing to score with --metric likelihood; use 1 or more"
        )


def _say_what_is_unused(objective: Any, settings: Any, drawn: dict[str, Any]) -> None:
    from megatron_eso.eval.evaluate import evaluation_objective, unused_options

    if os.environ.get("RANK", "0") == "0":
        for line in unused_options(evaluation_objective(objective, settings), **drawn):
            typer.echo(line, err=True)


def _check_writable(path: Path) -> None:
    """Create the file's folder; refuse one that cannot be written, or a folder with the file's name."""
    from megatron_eso.data.output import require_writable
    from megatron_eso.errors import DataError

    require_writable(path.parent, f"--json {path}")
    if path.is_dir():
        raise DataError(f"--json {path} is a folder; name a file")


def _check_data(
    data: str, tokenizer: Path | None, text_key: str | None, bad_documents: str | None
) -> bool:
    """Return whether the data are a prepared split, not raw text; refuse options for raw text then."""
    from megatron_eso.data.manifest import MANIFEST_NAME
    from megatron_eso.errors import ConfigError, DataError
    from megatron_eso.files import is_remote

    if bad_documents not in (None, "error", "skip"):
        raise ConfigError(f"--bad-documents {bad_documents} must be error or skip")
    splits = sorted(Path(data).glob(f"*/{MANIFEST_NAME}"))
    if splits:
        raise DataError(
            f"{data} is a prepared data set; name one split, such as {splits[0].parent}"
        )
    if not is_remote(data) and not (Path(data) / MANIFEST_NAME).is_file():
        if not Path(data).exists():
            raise DataError(
                f"{data} does not exist; give a split that `megatron-eso data prepare` made, or a text, "
                "jsonl or parquet file"
            )
        return False
    if tokenizer is not None:
        raise ConfigError(
            f"--tokenizer {tokenizer} applies only to raw text; {data} is a prepared split, which was "
            "encoded with its own tokenizer: leave --tokenizer out"
        )
    if text_key is not None:
        raise ConfigError(
            f"--text-key {text_key} applies only to records of raw text; {data} is a prepared split, "
            "which holds tokens: leave --text-key out"
        )
    if bad_documents is not None:
        raise ConfigError(
            f"--bad-documents {bad_documents} applies only to raw text; {data} is a prepared split, whose "
            "documents `data prepare` has judged: leave --bad-documents out"
        )
    return True


def _reader(
    data: str,
    loaded: Any,
    tokenizer: Path | None,
    config: Any,
    raw: dict[str, Any] | None,
) -> Any:
    """Return the reader of a prepared split, or of raw text, which is read with the options ``raw``."""
    from megatron_eso.cli.model_loading import require_tokenizer_of_model
    from megatron_eso.data.reader import ValidationReader
    from megatron_eso.data.text_rows import TextRows
    from megatron_eso.errors import CheckpointError

    shape = {
        "sequence_length": config.train.sequence_length,
        "vocab_size": config.model.vocab_size,
    }
    if raw is None:
        return ValidationReader(data, **shape, tokenizer_sha256=_tokenizer_of_training(loaded))
    file = tokenizer or loaded.tokenizer_file
    if file is None:
        raise CheckpointError(f"{loaded.path} has no tokenizer; give one with --tokenizer")
    require_tokenizer_of_model(file, loaded.path, config.model)
    return TextRows(data, file, **shape, **raw)


def _tokenizer_of_training(loaded: Any) -> str | None:
    """Return the hash of the tokenizer of a checkpoint's data; None for a model from elsewhere."""
    from megatron_eso.checkpoint.folder import SIDECAR, read_sidecar

    if not (loaded.path / SIDECAR).is_file():
        return None
    return read_sidecar(loaded.path).get("data", {}).get("tokenizer")


def _report(scores: list[Any], title: str, json_file: Path | None, num_skipped: int | None) -> None:
    """Print and write the scores, with the number of bad documents that were skipped, if they may be."""
    from megatron_eso.files import write_json

    left_out = "" if num_skipped is None else f", {num_skipped} bad documents left out"
    _show(scores, title + left_out)
    if json_file is not None:
        skipped = {} if num_skipped is None else {"num_skipped": num_skipped}
        write_json(json_file, [score.as_dict() | skipped for score in scores])


def _show(scores: list[Any], title: str) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("metric", "nats/token", "+-", "perplexity", "bits/token", "bits/byte"):
        table.add_column(column, justify="left" if column == "metric" else "right", no_wrap=True)
    for s in scores:
        numbers = (s.perplexity, s.bits_per_token, s.bits_per_byte)
        table.add_row(
            s.metric, f"{s.nats_per_token:.4f}", s.shown_error(), *(f"{n:.4f}" for n in numbers)
        )
    console = Console()
    console.print(title, soft_wrap=True)
    console.print(table)
