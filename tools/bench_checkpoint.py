"""Stall of a checkpoint of a 200M-parameter model on this machine, against the synchronous save.

    python -m tools.bench_checkpoint FOLDER              the table
    python -m tools.bench_checkpoint FOLDER --layers 2   a smaller model, to try it

One process, float32. Each save writes weights, both moments and the average (16 bytes a parameter). The
asynchronous save is a fork: its stall is what `save` takes; the pages that training then changes are
copied as it goes, which the steps after it pay, so their time is reported too. The last lines are of a
new process that resumes from what was written and does one step; times count from its start.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from megatron_eso.checkpoint.find import find_checkpoint
from megatron_eso.checkpoint.load import load_training_state
from megatron_eso.checkpoint.save import Saver
from megatron_eso.checkpoint.state import collect
from megatron_eso.config import load_config
from megatron_eso.launch.environment import Ranks
from megatron_eso.parallel.exchange import Rows
from megatron_eso.train.session import Session, build_session
from megatron_eso.train.step import train_step

LENGTH, VOCAB, SAVES = 128, 32768, 3


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder to write to; what is there stays")
    parser.add_argument("--layers", type=int, default=12, help="layers of the model [12]")
    parser.add_argument("--resume", action="store_true", help="only resume and do one step")
    options = parser.parse_args()
    if options.resume:
        return _resume(options)
    options.folder.mkdir(parents=True, exist_ok=True)
    # A saver also writes beside its checkpoints, so they get their own run folder.
    with tempfile.TemporaryDirectory(dir=options.folder) as run:
        options.folder = Path(run, "checkpoints")
        options.folder.mkdir()
        _measure(_session(options.layers), options)


def _resume(options: argparse.Namespace) -> None:
    """Print the seconds from this process's start until it has imported, built, loaded, and stepped."""
    started, marks = psutil.Process().create_time(), []
    marks.append(time.time() - started)
    session = _session(options.layers, draw_weights=False)
    marks.append(time.time() - started)
    folder = find_checkpoint(options.folder, hashes=True)
    session.state.step = load_training_state(
        folder,
        folder.sidecar(),
        session.chunks,
        session.optimizer,
        session.average,
        session.layout.weights_group,
    )
    marks.append(time.time() - started)
    train_step(session, read)
    marks.append(time.time() - started)
    print(*(f"{mark:.1f}" for mark in marks))


def _measure(session: Session, options: argparse.Namespace) -> None:
    number = sum(p.numel() for chunk in session.chunks for p in chunk.parameters())
    print(f"{number / 1e6:.0f}M parameters, {16 * number / 2**30:.2f} GiB a checkpoint, "
          f"{torch.get_num_threads()} threads, rows of {LENGTH}")  # fmt: skip
    alone = [_step(session) for _ in range(4)][1:]
    synchronous = [_save(session, options.folder, is_async=False)[0] for _ in range(SAVES)]
    stalls, during, after = [], [], []
    saver = _saver(session, options.folder, is_async=True)
    for _ in range(SAVES):
        stalls.append(_save(session, options.folder, is_async=True, saver=saver)[0])
        during.append(_step(session))
        begin = time.perf_counter()
        saver.finish()
        after.append(time.perf_counter() - begin)
    median = statistics.median
    print("| what | seconds (median of runs) |\n|---|---|")
    print(f"| step, nothing else going on | {median(alone):.2f} |")
    print(f"| synchronous save | {median(synchronous):.2f} |")
    print(f"| stall of an asynchronous save | {median(stalls):.3f} (first {stalls[0]:.3f}) |")
    print(f"| stall / synchronous save | {median(stalls) / median(synchronous):.1%} |")
    print(f"| stall / step | {median(stalls) / median(alone):.1%} |")
    print(f"| step right after the save began | {median(during):.2f} |")
    print(f"| committed after that step, at most | {median(after):.2f} |")
    command = [sys.executable, "-m", "tools.bench_checkpoint", str(options.folder), "--resume",
               "--layers", str(options.layers)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported, built, loaded, stepped = done.stdout.split()[-4:]
    print(f"| new process: from its start to its first step (aim 15) | {loaded} |")
    print(f"| of that: imports done at, session built at; first step done at | {imported}, {built}; "
          f"{stepped} |")  # fmt: skip


def read(step: int, rows: list[int]) -> Rows:
    """Return artificial rows."""
    tokens = torch.randint(0, VOCAB - 1, (len(rows), LENGTH + 1))
    return Rows(tokens, torch.ones_like(tokens, dtype=torch.bool))


def _session(layers: int, *, draw_weights: bool = True) -> Session:
    config = load_config(
        None,
        [
            "model.hidden_size=1024", f"model.num_layers={layers}", "model.num_heads=16",
            f"model.vocab_size={VOCAB}", f"train.sequence_length={LENGTH}", "train.steps=1000",
            "train.global_batch_rows=8", "train.micro_batch_rows=8", "precision.dtype=fp32",
            "objective.alpha_0=1", "optimizer.ema_decay=0.99",
        ],
    )  # fmt: skip
    return build_session(config, Ranks(0, 1, 0), draw_weights=draw_weights)


def _saver(session: Session, folder: Path, *, is_async: bool) -> Saver:
    settings = replace(session.config.checkpoint, asynchronous=is_async, keep_last=1)
    return Saver(folder, settings, session.torch_device)


def _save(
    session: Session, folder: Path, *, is_async: bool, saver: Saver | None = None
) -> tuple[float, Saver]:
    """Save the current step; return how long training stood still."""
    saver = saver or _saver(session, folder, is_async=is_async)
    session.state.step += 1  # gives every save its own name
    begin = time.perf_counter()
    state: dict[str, Any] = collect(
        session.chunks, session.optimizer, session.average, session.layout.weights_group
    )
    saver.save(session.state.step, state, _sidecar(session))
    return time.perf_counter() - begin, saver


def _sidecar(session: Session) -> dict[str, Any]:
    return {"step": session.state.step, "has_ema": True, "format_version": 1}


def _step(session: Session) -> float:
    begin = time.perf_counter()
    train_step(session, read)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
