"""``megatron-eso eval``: score held-out data with a checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Run folder or checkpoint folder")],
    data: Annotated[Path, typer.Argument(help="Held-out split, for example .../validation")],
    orders: Annotated[int, typer.Option(help="Orders K of the likelihood bound; 0: none")] = 1,
    repeats: Annotated[int, typer.Option(help="Times and masks drawn per row for the NELBO")] = 1,
    rows: Annotated[int, typer.Option(help="Rows to score; 0: all")] = 0,
    alpha_0: Annotated[
        float | None, typer.Option(help="alpha_0 to score with [as trained]")
    ] = None,
    raw_weights: Annotated[bool, typer.Option(help="Not the moving average")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write JSON here")] = None,
) -> None:
    """Print the NELBO and the exact-likelihood bound of held-out rows.

    Examples:
        megatron-eso eval runs/quickstart runs/data/stdlib/validation --orders 4
    """
    import json
    from dataclasses import replace

    import torch
    from rich.console import Console
    from rich.table import Table

    from megatron_eso.cli.model_loading import load
    from megatron_eso.config.check import check
    from megatron_eso.data.reader import ValidationReader
    from megatron_eso.eval.evaluate import evaluate as run
    from megatron_eso.parallel.exchange import Rows
    from megatron_eso.parallel.finish import finish

    loaded = load(checkpoint, use_ema=not raw_weights, dtype="fp32", with_tokenizer=False)
    config = loaded.replica.config
    settings = replace(
        config.eval, likelihood_orders=orders, nelbo_repeats=repeats, alpha_0=alpha_0
    )
    config = replace(config, eval=settings)
    check(config)
    reader = ValidationReader(
        data,
        sequence_length=config.train.sequence_length,
        vocab_size=config.model.vocab_size,
    )

    def read(numbers: list[int]) -> Rows:
        got = reader.read(numbers)
        return Rows(torch.from_numpy(got.tokens), torch.from_numpy(got.is_valid))

    count = min(rows or reader.num_rows, reader.num_rows)
    replica = replace(loaded.replica, config=config)
    scores = run(replica, read, num_rows=count, bytes_per_token=reader.bytes_per_token)
    table = Table(title=f"{loaded.folder.path} ({loaded.kind}) on {data}: {count} rows")
    for column in ("metric", "nats/token", "+-", "perplexity", "bits/token", "bits/byte"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for s in scores:
        numbers = (
            s.nats_per_token,
            s.standard_error,
            s.perplexity,
            s.bits_per_token,
            s.bits_per_byte,
        )
        table.add_row(s.metric, *(f"{n:.4f}" for n in numbers))
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps([s.as_dict() for s in scores], indent=1))
    finish()
