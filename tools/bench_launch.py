"""Speed of the commands of the login node, against what they may take.

    python -m tools.bench_launch

Each is the whole command as a person runs it, Python's start included: the median of some. Slurm's
answers are files, so that only our part is measured.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.arguments import at_least_1

_RUN = ["configs/run/quickstart.yaml", "train.global_batch_rows=64", "train.micro_batch_rows=2"]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=at_least_1, default=5, help="runs of each command [5]")
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        queue = _make_runs(folder, 100)
        environment = _slurm(folder, queue)
        shared = [f"folder={folder}/r", f"cluster.shared_folders=['{folder}']"]
        for what, words, limit in (
            ("submit --dry-run (checks, script)", ["submit", *_RUN, "--dry-run"], 1.0),
            ("submit --test-only (and Slurm's answers)", ["submit", *_RUN, "--test-only"], 1.0),
            ("submit (and snapshot)", ["submit", *_RUN, *shared], None),
            ("status of 100 runs", ["status"], 2.0),
            ("status of one run", ["status", f"{folder}/run0"], None),
        ):
            seconds = statistics.median(_time(words, environment) for _ in range(repeats))
            allowed = f"of {limit:g} s allowed" if limit else ""
            print(f"{what:<42}{seconds:6.2f} s  {allowed}")


def _time(words: list[str], environment: dict[str, str]) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "megatron_eso", *words], check=True, env=environment,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    return time.perf_counter() - begin


def _make_runs(folder: Path, number: int) -> str:
    """Create run folders with long metrics; return what squeue says about them."""
    lines = []
    metrics = (
        '{"step": 50, "loss": 2.5, "tokens_per_second": 1000.0, "seconds_per_step": 2.0}\n'
        * 100_000
    )
    for i in range(number):
        run = folder / f"run{i}"
        (run / "checkpoints").mkdir(parents=True)
        status = {"state": "running", "step": 50, "total_steps": 100, "updated": time.time()}
        (run / "status.json").write_text(json.dumps(status))
        (run / "metrics.jsonl").write_text(metrics)
        lines.append(f"{i}|RUNNING|None|n{i}|1:00|2026-11-26T06:00:00|megatron-eso|{run}\n")
    return "".join(lines)


def _slurm(folder: Path, queue: str) -> dict[str, str]:
    """Return an environment whose Slurm commands answer from files."""
    answers = {
        "squeue": queue, "sbatch": "7\n", "scontrol": "", "sacct": "",
        "sinfo": "main|up|4|idle|gpu:h100:8|infinite|208|1000000\n",
    }  # fmt: skip
    programs = folder / "bin"
    programs.mkdir()
    for name, text in answers.items():
        (programs / f"{name}.text").write_text(text)
        (programs / name).write_text(
            f'#!/bin/sh\ncase "$*" in *--jobs*) exit;; esac\nexec cat {programs}/{name}.text\n'
        )
        (programs / name).chmod(0o755)
    return {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}


if __name__ == "__main__":
    main()
