"""Run the cells of a sweep on this machine, or write them as a Slurm array; restartable.

A cell's folder holds cell.yaml (configuration), fingerprint, log.txt, run/ (the run's folder), and what
scaling/attempts.py keeps there. A cell's state is read from these files alone, so nothing is lost when a
runner is killed.
"""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_eso.config.load import save_config
from megatron_eso.config.schema import RunConfig
from megatron_eso.errors import ClusterError, ConfigError
from megatron_eso.files import read_json, read_json_lines, write_whole
from megatron_eso.scaling import attempts
from megatron_eso.scaling.grid import Cell

# Command that trains one cell; it takes a configuration file. Tests replace it.
TRAINER = (sys.executable, "-m", "megatron_eso", "train")
Look = Callable[[list[RunConfig]], None]
"""Looks at the data of runs that are to start; raises a DataError if they do not fit."""


def no_look(runs: list[RunConfig]) -> None:
    """Trust the data."""


@dataclass(frozen=True)
class CellState:
    """How far a cell is."""

    cell: Cell
    state: str
    """illegal, waiting, running, finished, stopped, failed, given-up or changed.

    stopped: interrupted. given-up: failed too often. changed: it was started with other settings.
    """
    step: int = 0
    """Last logged step."""
    loss: float | None = None
    """Training loss of that step, as logged."""
    attempts: int = 0
    """Starts."""
    eta_seconds: float | None = None
    """Steps left times the seconds of the last one; None before the first logged step."""
    reason: tuple[str, ...] = ()
    """Of a failure: lines with what the trainer said last, and where its log is."""


def cell_folder(sweep_folder: Path, cell: Cell) -> Path:
    """Return the folder of a cell."""
    return sweep_folder / "cells" / cell.name


def read_state(sweep_folder: Path, cell: Cell, *, max_attempts: int = 2) -> CellState:
    """Return a cell's state by its files; after ``max_attempts`` failures it is given up."""
    if cell.problems:
        return CellState(cell, "illegal")
    folder = cell_folder(sweep_folder, cell)
    starts, failures, has_failed = attempts.count_attempts(folder)
    stored = attempts.lines_of(folder / "fingerprint")
    is_started = bool(starts) or (folder / "run").is_dir()
    if is_started and stored and stored[0] != cell.fingerprint:
        return CellState(cell, "changed", attempts=starts)
    status = read_json(folder / "run" / "status.json")
    steps = [line for line in read_metrics(folder / "run") if "loss" in line]
    last = steps[-1] if steps else {}
    step, eta = int(last.get("step", 0)), None
    if steps:
        eta = (cell.run.train.steps or 0) - step
        eta *= last.get("seconds_per_step", 0.0)
    state = "waiting"
    if status.get("state") == "finished":
        state = "finished"
    elif attempts.is_alive(folder):
        state = "running"
    elif failures >= max_attempts:
        state = "given-up"
    elif starts:
        state = "failed" if has_failed else "stopped"
    reason = ()
    if state in ("failed", "given-up"):
        log = folder / "log.txt"
        reason = (*attempts.last_words(log), f"log: {log}")
    return CellState(cell, state, step, last.get("loss"), starts, eta, reason)


def run_cells(
    sweep_folder: Path,
    cells: list[Cell],
    *,
    workers: int = 1,
    max_attempts: int = 2,
    say: Callable[[str], None] = print,
    look: Look = no_look,
    trainer: tuple[str, ...] = TRAINER,
) -> list[CellState]:
    """Run all cells that are not finished; return the final states.

    Args:
        sweep_folder: the study's folder.
        cells: the grid.
        workers: cells at once.
        max_attempts: failures after which a cell is given up, counted over all calls.
        say: receives a line for every change.
        look: looks at the data of the runs that are to start, before any of them does.
        trainer: command that trains a cell, without its configuration file.

    Raises:
        ConfigError: if cells were started with other settings.
        DataError: of ``look``.
    """
    states = [read_state(sweep_folder, cell, max_attempts=max_attempts) for cell in cells]
    changed = [state.cell.name for state in states if state.state == "changed"]
    if changed:
        raise ConfigError(
            f"{len(changed)} cell(s) ran with other settings: {', '.join(changed[:4])}; move "
            f"{sweep_folder}/cells/<cell> aside, or set another folder=..."
        )
    todo = [state.cell for state in states if state.state in ("waiting", "stopped", "failed")]
    look([cell.run for cell in todo])
    say(f"{len(cells)} cells: {_counts(states)}; {len(todo)} to run, {workers} at once")
    running: dict[str, tuple[Cell, subprocess.Popen]] = {}
    try:
        while todo or running:
            while todo and len(running) < workers:
                cell = todo.pop(0)
                with attempts.claim(cell_folder(sweep_folder, cell)) as is_ours:
                    now = read_state(sweep_folder, cell, max_attempts=max_attempts).state
                    if not is_ours or now in ("running", "finished", "given-up"):
                        say(f"skipping {cell.name}: another runner has it")
                        continue
                    running[cell.name] = (cell, _start(sweep_folder, cell, workers, trainer))
                say(f"start {cell.name} ({cell.run.train.steps} steps)")
            time.sleep(0.2)
            for name, (cell, process) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                attempts.note_end(cell_folder(sweep_folder, cell), process.returncode)
                state = read_state(sweep_folder, cell, max_attempts=max_attempts)
                loss = "" if state.loss is None else f", loss {state.loss:.4f}"
                say(f"{state.state} {name}{loss} (exit {process.returncode})")
                for line in state.reason:
                    say(f"    {line}")
                if state.state == "failed":
                    todo.append(cell)
    finally:
        for _, process in running.values():
            process.terminate()
        if running:
            with suppress(OSError):  # the reader of this output may be gone
                say(f"interrupted: {len(running)} cell(s) save and end; the same command continues")
        for cell, process in running.values():
            process.wait()
            attempts.forget_process(cell_folder(sweep_folder, cell))
    return [read_state(sweep_folder, cell, max_attempts=max_attempts) for cell in cells]


def states_table(states: list[CellState]) -> str:
    """Return the cells as text, a line each: state, step, training loss, starts, seconds left."""
    lines = [f"{'cell':<28}{'state':<10}{'step':>12}{'loss':>9}{'tries':>6}{'left s':>8}"]
    for state in states:
        loss = "" if state.loss is None else f"{state.loss:.4f}"
        left = "" if state.eta_seconds is None else f"{state.eta_seconds:.0f}"
        step = f"{state.step}/{state.cell.run.train.steps}"
        lines.append(
            f"{state.cell.name:<28}{state.state:<10}{step:>12}{loss:>9}{state.attempts:>6}{left:>8}"
        )
        lines += [f"    {line}" for line in (*state.cell.problems, *state.reason)]
    return "\n".join(lines)


def slurm_array_script(
    sweep_file: Path,
    cells: list[Cell],
    *,
    folder: Path,
    throttle: int,
    extra: list[str],
    workers: int = 1,
    max_attempts: int = 2,
) -> str:
    """Return an sbatch script with one array task per legal cell.

    Args:
        sweep_file: the sweep's YAML file.
        cells: the grid; illegal cells get no task.
        folder: working folder of the tasks, where relative paths of the sweep start.
        throttle: tasks at once.
        extra: further ``#SBATCH`` options, such as ``--partition=gpu``.
        workers: tasks that share a machine's cores.
        max_attempts: failures after which a cell is given up.
    """
    legal = [index for index, cell in enumerate(cells) if not cell.problems]
    array = ",".join(map(str, legal))
    options = [f"--array={array}%{throttle}", "--requeue", *extra]
    return "\n".join(
        [
            "#!/bin/bash",
            "#SBATCH --job-name=sweep",
            *(f"#SBATCH {option}" for option in options),
            "set -euo pipefail",
            f"cd {shlex.quote(str(folder))}",
            f"exec {shlex.quote(sys.executable)} -m megatron_eso sweep run {shlex.quote(str(sweep_file))}"
            f' --cell "$SLURM_ARRAY_TASK_ID" --workers {workers} --max-attempts {max_attempts}',
            "",
        ]
    )


def submit(script: Path) -> str:
    """Hand a script to ``sbatch`` and return its answer.

    Raises:
        ClusterError: if sbatch is missing or refuses.
    """
    try:
        done = subprocess.run(["sbatch", str(script)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ClusterError(f"sbatch is not on this machine; {script} is ready to submit") from None
    if done.returncode:
        raise ClusterError(f"sbatch refused {script}: {done.stderr.strip()}")
    return done.stdout.strip()


def read_metrics(run_folder: Path) -> list[dict]:
    """Return the lines of a run's metrics.jsonl; a line cut off by a crash is left out.

    A run that was restarted logs some steps twice. The later line counts.
    """
    by_step: dict = {}
    for line in read_json_lines(run_folder / "metrics.jsonl"):
        by_step[(line.get("step"), line.get("validation"), line.get("metric"))] = line
    return list(by_step.values())


def _start(
    sweep_folder: Path, cell: Cell, workers: int, trainer: tuple[str, ...]
) -> subprocess.Popen:
    folder = cell_folder(sweep_folder, cell)
    folder.mkdir(parents=True, exist_ok=True)
    save_config(cell.run, folder / "cell.yaml")  # first: a fingerprint is that of a cell.yaml
    write_whole(folder / "fingerprint", cell.fingerprint + "\n")
    attempts.note_start(folder)
    ranks = workers * cell.run.parallel.local_ranks
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    with open(folder / "log.txt", "a") as log:
        log.write(f"{attempts.LOG_MARK} {time.strftime('%Y-%m-%dT%H:%M:%S')} ---\n")
        log.flush()
        process = subprocess.Popen(
            [*trainer, str(folder / "cell.yaml")],  # says folder/run; a path may be no YAML
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    attempts.note_process(folder, process.pid)
    return process


def _counts(states: list[CellState]) -> str:
    names = [state.state for state in states]
    return ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
