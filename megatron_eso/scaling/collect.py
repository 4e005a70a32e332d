"""The runs of a study, finished or not, as two tables: a row for each cell, a row for each logged step.

Losses are in nats per token. Tables are written as CSV and parquet, and read back by the fits.
"""

import csv
import io
import platform
from pathlib import Path
from typing import Any

from megatron_eso.config.load import load_config
from megatron_eso.errors import DataError, UserError
from megatron_eso.files import read_json, write_whole
from megatron_eso.scaling.doubts import Row, why_diverged
from megatron_eso.scaling.grid import Cell, as_run
from megatron_eso.scaling.runner import cell_folder, read_metrics, read_state


def collect(sweep_folder: Path, cells: list[Cell]) -> tuple[list[Row], list[Row]]:
    """Return (rows of cells, rows of steps) of a study; illegal cells are left out.

    A cell whose settings were changed since has the tokens, FLOPs and rate that it ran with.

    Args:
        sweep_folder: the study's folder.
        cells: the grid.
    """
    cell_rows, step_rows = [], []
    for cell in cells:
        if cell.problems:
            continue
        state = read_state(sweep_folder, cell)
        if state.state == "changed":
            cell = as_run(cell, load_config(cell_folder(sweep_folder, cell) / "cell.yaml"))
        metrics = read_metrics(cell_folder(sweep_folder, cell) / "run")
        steps = [line for line in metrics if "loss" in line]
        cell_rows.append(_cell_row(sweep_folder, cell, state.state, steps))
        total = cell.run.train.steps or 1
        step_rows += [
            {
                "cell": cell.name,
                "step": line["step"],
                "tokens": line.get("tokens"),
                "flops": cell.flops * line["step"] / total,
                "loss": line["loss"],
                "learning_rate": line.get("learning_rate"),
                "grad_norm": line.get("grad_norm"),
                "tokens_per_second": line.get("tokens_per_second"),
            }
            for line in steps
        ]
    return cell_rows, step_rows


def _cell_row(sweep_folder: Path, cell: Cell, state: str, steps: list[dict]) -> Row:
    run_folder = cell_folder(sweep_folder, cell) / "run"
    metric, value, error = _validation(run_folder / "evaluation.json")
    losses = [line["loss"] for line in steps]
    remark = why_diverged(losses)
    parallel = cell.run.parallel
    provenance = read_json(run_folder / "run.json")
    return {
        "cell": cell.name,
        "objective": cell.objective,
        "size": cell.size,
        "budget": cell.budget if cell.tokens_per_parameter is None else None,
        "tokens_per_parameter": cell.tokens_per_parameter,
        "parameters": cell.num_parameters,
        "parameters_without_embeddings": cell.num_parameters_without_embeddings,
        "tokens": cell.tokens,
        "flops": cell.flops,
        "flops_full_attention": cell.flops_full_attention,
        "flops_published": cell.flops_published,
        "steps_done": int(steps[-1]["step"]) if steps else 0,
        "steps": cell.run.train.steps,
        "state": "diverged" if remark and state == "finished" else state,
        "remark": remark,
        "train_loss": losses[-1] if losses else None,
        "loss": value,
        "loss_error": error,
        "metric": metric,
        "unigram_loss": _mean(run_folder / "evaluation.json", "unigram"),
        "learning_rate": cell.run.optimizer.learning_rate,
        "sequence_length": cell.run.train.sequence_length,
        "vocab_size": cell.run.model.vocab_size,
        "data": ";".join(source.path for source in cell.run.data.sources),
        "layout": f"tp{parallel.tensor} pp{parallel.pipeline} ranks{provenance.get('num_ranks', 1)}",
        "host": provenance.get("host", platform.node()),
        "commit": provenance.get("commit", ""),
        "seconds_per_step": steps[-1].get("seconds_per_step") if steps else None,
    }


def _validation(path: Path) -> tuple[str | None, float | None, float | None]:
    """Return metric, mean loss and largest standard error over the validation sets; None where unknown.

    The NELBO counts where it was scored. ar has an exact likelihood instead.
    """
    for prefix in ("nelbo", "likelihood"):
        chosen = _scores(path, prefix)
        if chosen:
            errors = [e["standard_error"] for e in chosen if e["standard_error"] is not None]
            return chosen[0]["metric"], _mean(path, prefix), max(errors, default=None)
    return None, None, None


def _mean(path: Path, prefix: str) -> float | None:
    """Return the mean of a metric over the tokens of all validation sets; None if it was not scored."""
    chosen = _scores(path, prefix)
    tokens = sum(entry["num_tokens"] for entry in chosen)
    return sum(e["nats_per_token"] * e["num_tokens"] for e in chosen) / tokens if chosen else None


def _scores(path: Path, prefix: str) -> list[dict[str, Any]]:
    found = [entry for entries in read_json(path).values() for entry in entries]
    return [entry for entry in found if entry["metric"].startswith(prefix)]


def tensorboard_steps(folder: Path, tag: str) -> list[Row]:
    """Return the points of the scalar ``tag`` in every TensorBoard run below ``folder``.

    Returns:
        Rows of cell (the run's folder below ``folder``), step and loss (the scalar's value).

    Raises:
        DataError: if there is no such folder, or no run has the tag; the message names the tags there are.
        UserError: if tensorboard is not installed.
    """
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        raise UserError("reading TensorBoard files needs: pip install tensorboard") from None
    if not folder.is_dir():
        raise DataError(f"--tensorboard {folder} is not a folder; give the one that holds the runs")
    rows, known = [], set()
    for run in sorted({path.parent for path in folder.rglob("events.out.tfevents.*")}):
        events = EventAccumulator(str(run), size_guidance={"scalars": 0})
        events.Reload()
        tags = events.Tags()["scalars"]
        known.update(tags)
        if tag in tags:
            name = str(run.relative_to(folder))
            rows += [
                {"cell": name, "step": event.step, "loss": event.value}
                for event in events.Scalars(tag)
            ]
    if not rows:
        raise DataError(
            f"{folder}: no scalar '{tag}'; there are: {', '.join(sorted(known)) or 'none'}"
        )
    return rows


def write_table(rows: list[Row], stem: Path) -> list[Path]:
    """Write rows as STEM.csv, and as STEM.parquet where pyarrow is installed; return the paths.

    Raises:
        DataError: if there is no row.
    """
    require_rows(rows, stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_suffix(".csv")]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_whole(paths[0], text.getvalue())
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return paths
    paths.append(stem.with_suffix(".parquet"))
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), content)
    write_whole(paths[1], content.getvalue())
    return paths


def require_rows(rows: list[Row], stem: Path) -> None:
    """Raise a DataError if there is no row to write."""
    if not rows:
        raise DataError(f"nothing to write to {stem}.csv: no run has logged anything yet")


def read_table(path: Path) -> list[Row]:
    """Return the rows of a table (.csv or .parquet) that :func:`write_table` wrote; empty cells are None.

    Raises:
        DataError: if it is missing, is no table, has no row, or has a row that does not fit the head.
        UserError: for .parquet without pyarrow.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder; give the table in it, such as {path / 'cells.csv'}")
    if not path.is_file():
        raise DataError(f"{path} does not exist; write it with `megatron-eso sweep collect`")
    if path.suffix in (".yaml", ".yml"):
        raise DataError(
            f"{path} is a sweep's configuration, not its table; give the cells.csv that "
            f"`megatron-eso sweep collect {path}` writes"
        )
    try:
        rows = _read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
    except (
        OSError,
        ValueError,
        csv.Error,
    ) as error:  # also text that is not UTF-8, a damaged parquet
        raise DataError(
            f"{path} cannot be read ({error}); write it again with `megatron-eso sweep collect`"
        ) from None
    if not rows:
        raise DataError(f"{path} has no rows")
    return rows


def _read_parquet(path: Path) -> list[Row]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path} needs pyarrow; give the .csv beside it") from None
    return pyarrow.parquet.read_table(path).to_pylist()


def _read_csv(path: Path) -> list[Row]:
    rows = []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        names = next(reader, [])
        for cells in filter(None, reader):
            if len(cells) != len(names):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(cells)} values for {len(names)} columns"
                )
            rows.append(dict(zip(names, map(_value, cells), strict=True)))
    return rows


def _value(text: str) -> Any:
    if text == "":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
