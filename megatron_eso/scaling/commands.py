"""What the subcommands of ``megatron-eso sweep`` do."""

from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_eso.config.schema import RunConfig
from megatron_eso.errors import ConfigError, DataError, VocabularyError
from megatron_eso.files import write_whole
from megatron_eso.scaling import collect as collecting
from megatron_eso.scaling.doubts import (
    Row,
    doubts,
    hardly_better_than_unigram,
    part,
    why_not_finished,
)
from megatron_eso.scaling.grid import Cell, make_grid
from megatron_eso.scaling.runner import (
    Look,
    no_look,
    read_state,
    run_cells,
    slurm_array_script,
    states_table,
)
from megatron_eso.scaling.runner import submit as submit_script
from megatron_eso.scaling.sweep_config import SweepConfig


def run(
    sweep_file: Path,
    overrides: list[str] | None,
    workers: int,
    max_attempts: int,
    cell: int | None,
    *,
    say: Callable[[str], None],
    look: Look = no_look,
) -> bool:
    """Run the study's cells; return whether all legal ones are finished.

    Args:
        sweep_file: the study.
        overrides: of its settings, as ``key=value``.
        workers: cells at once.
        max_attempts: failures after which a cell is given up.
        cell: number of the only cell to run, from 0; None: all.
        say: receives a line for every change.
        look: looks at the data of the cells that are to start, before any of them does.

    Raises:
        ConfigError: for wrong settings or numbers, or if cells were started with other settings.
        DataError: of ``look``, with the files that hold the settings.
    """
    _check_at_least_1(workers=workers, max_attempts=max_attempts)
    sweep, cells = make_grid(sweep_file, overrides)
    if cell is not None:
        if not 0 <= cell < len(cells):
            raise ConfigError(f"--cell {cell}: the grid has cells 0 to {len(cells) - 1}")
        cells = [cells[cell]]
    states = run_cells(
        _made(sweep), cells, workers=workers, max_attempts=max_attempts, say=say,
        look=_naming_files(look, sweep_file, sweep, cells),
    )  # fmt: skip
    say(states_table(states))
    return all(state.state in ("finished", "illegal") for state in states)


def submit_array(
    sweep_file: Path,
    overrides: list[str] | None,
    workers: int,
    max_attempts: int,
    throttle: int,
    options: list[str],
    *,
    look: Look = no_look,
) -> str:
    """Write FOLDER/array.sbatch and submit it; return what sbatch says.

    Args:
        sweep_file: the study.
        overrides: refused, since the tasks read the file again.
        workers: tasks that share a machine's cores.
        max_attempts: failures after which a cell is given up.
        throttle: tasks at once.
        options: further sbatch options.
        look: looks at the data of the legal cells before anything is written.

    Raises:
        ConfigError: for wrong settings or numbers, or overrides.
        DataError: of ``look``, with the files that hold the settings.
        ClusterError: if sbatch is missing or refuses.
    """
    _check_at_least_1(workers=workers, max_attempts=max_attempts, throttle=throttle)
    if overrides:
        raise ConfigError(
            "with --slurm write overrides into the sweep file: every task reads it again"
        )
    sweep, cells = make_grid(sweep_file, overrides)
    look = _naming_files(look, sweep_file, sweep, cells)
    look([cell.run for cell in cells if not cell.problems])
    script = _made(sweep) / "array.sbatch"
    write_whole(
        script,
        slurm_array_script(
            sweep_file.resolve(),
            cells,
            folder=Path.cwd(),
            throttle=throttle,
            extra=options,
            workers=workers,
            max_attempts=max_attempts,
        ),
    )
    return f"{script}: {submit_script(script)}"


def status(sweep_file: Path, overrides: list[str] | None, max_attempts: int = 2) -> str:
    """Return the cells as text; see :func:`megatron_eso.scaling.runner.states_table`."""
    _check_at_least_1(max_attempts=max_attempts)
    sweep, cells = make_grid(sweep_file, overrides)
    folder = Path(sweep.folder)
    return states_table([read_state(folder, cell, max_attempts=max_attempts) for cell in cells])


def collect(
    sweep_file: Path, overrides: list[str] | None, tensorboard: Path | None, tag: str
) -> str:
    """Write the study's tables; return as text where they are, and which cells a fit will leave out.

    Args:
        sweep_file: the study.
        overrides: of its settings, as ``key=value``.
        tensorboard: folder of another trainer's runs; then only their points are tabulated.
        tag: scalar to read there.

    Raises:
        DataError: if nothing was logged; then nothing is written.
    """
    sweep, cells = make_grid(sweep_file, overrides)
    folder = Path(sweep.folder)
    if tensorboard is not None:
        steps = collecting.tensorboard_steps(tensorboard, tag)
        return _say(collecting.write_table(steps, _made(sweep) / "tensorboard_steps"))
    tables = dict(zip(("cells", "steps"), collecting.collect(folder, cells), strict=True))
    for name, rows in tables.items():  # both or none
        collecting.require_rows(rows, folder / name)
    _made(sweep)
    written = (collecting.write_table(rows, folder / name) for name, rows in tables.items())
    said = _say([path for paths in written for path in paths])
    return "\n".join([said, *_not_to_be_fitted(tables["cells"])])


def _not_to_be_fitted(rows: list[Row]) -> list[str]:
    """Return a line for each cell that a fit will leave out, or that learned next to nothing."""
    usable, unfinished = part(rows, map(why_not_finished, rows))
    _, doubted = part(usable, doubts(usable))
    lines = [f"will be left out: {row['cell']}: {why}" for row, why in (*unfinished, *doubted)]
    idle = hardly_better_than_unigram(usable)
    words = "is hardly better than token frequencies (unigram_loss)"
    return lines + [f"{cell} {words}" for cell in idle]


def fit(table: Path, budget: float | None, keep: Sequence[str] = ()) -> str:
    """Return the fits of a table as text; see :func:`megatron_eso.scaling.study.fit_study`."""
    from megatron_eso.scaling.study import fit_study, study_text

    _check_budget(budget)
    return study_text(fit_study(collecting.read_table(table), budget=budget, keep=keep))


def _check_budget(budget: float | None) -> None:
    if budget is not None and not 0 < budget < float("inf"):
        raise ConfigError(f"--budget {budget:g} must be a number of FLOPs above 0")


def report(
    table: Path, out: Path, budget: float | None, note: Path | None, keep: Sequence[str] = ()
) -> str:
    """Write the report and return as text where it is.

    Args:
        table: cells.csv or cells.parquet.
        out: the page, .html.
        budget: FLOPs to extrapolate to; None: four times the largest measured.
        note: text file for the top of the page.
        keep: cells that are fitted although they are doubtful or diverged.

    Raises:
        ConfigError: for a budget that is no positive number, or a cell in ``keep`` that is not there.
        DataError: if the table or the note cannot be read, or nothing can be fitted.
        UserError: if the page cannot be written, or matplotlib or scipy is missing.
    """
    from megatron_eso.scaling.report import require_page, write_report
    from megatron_eso.scaling.study import fit_study

    text = _read_note(note) if note else ""
    _check_budget(budget)
    require_page(out)
    study = fit_study(collecting.read_table(table), budget=budget, keep=keep)
    return _say(write_report(study, out, note=text))


def _read_note(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--note {path} cannot be read as text: {error}") from None


def _check_at_least_1(**options: int) -> None:
    for name, value in options.items():
        if value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least 1")


def _naming_files(look: Look, sweep_file: Path, sweep: SweepConfig, cells: list[Cell]) -> Look:
    """Return a look at the data whose errors name the files with the settings that are wrong.

    The base names the data; a vocabulary is of some of the models.
    """
    base = sweep_file.parent / sweep.base

    def named(runs: list[RunConfig]) -> None:
        for size in dict.fromkeys(run.model.vocab_size for run in runs):
            try:
                look([run for run in runs if run.model.vocab_size == size])
            except VocabularyError as error:
                own = {cell.size for cell in cells if cell.run.model.vocab_size == size}
                models = [model for model in sweep.models if Path(model).stem in own]
                raise DataError(
                    f"{base}: {error}; model.vocab_size={size} is of {', '.join(models[:4])} (models in "
                    f"{sweep_file})"
                ) from None
            except DataError as error:
                raise DataError(f"{base}: {error}") from None

    return named


def _made(sweep: SweepConfig) -> Path:
    """Make and return the study's folder."""
    folder = Path(sweep.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"folder={folder} cannot be made: {error}; set another folder=") from None
    return folder


def _say(paths: list[Path]) -> str:
    return "\n".join(f"wrote {path}" for path in paths)
