"""The planner's step time against real runs on this machine: calibrated on two, held to three others.

    python -m tools.bench_planner FOLDER

Each run is `megatron-eso train` on two ranks of one thread each, on data made here; the median step
counts. The two runs that calibrate differ from the three that are predicted in layout, width or
objective. The other choices of two among the five follow, so that the choice shown is no lucky one.
Run it on a machine that does nothing else.
"""

import argparse
import itertools
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from megatron_eso.plan.calibrate import Measured, compare, fit_constants
from megatron_eso.plan.hardware import Hardware
from megatron_eso.plan.measured import read_measured
from tools.arguments import hardware

LENGTH, VOCABULARY, STEPS = 256, 4096, 8
COMMON = [
    f"train.sequence_length={LENGTH}", f"model.vocab_size={VOCABULARY}", f"train.steps={STEPS}",
    "train.log_every_steps=1", "train.global_batch_rows=16", "train.micro_batch_rows=4",
    "parallel.local_ranks=2", "precision.dtype=fp32", "eval.num_rows=4", "optimizer.ema_decay=0",
]  # fmt: skip
# Two runs that calibrate the planner, then three that it predicts.
RUNS = {
    "tensor 2, 256 wide, alpha_0 = 1": ["model.hidden_size=256", "model.num_layers=6",
                                        "parallel.tensor=2"],
    "data 2, 512 wide, ar": ["model.hidden_size=512", "model.num_layers=4", "model.num_heads=8",
                             "objective.name=ar"],
    "tensor 2, 512 wide, alpha_0 = 0.25": ["model.hidden_size=512", "model.num_layers=6",
                                           "model.num_heads=8", "objective.alpha_0=0.25",
                                           "parallel.tensor=2"],
    "pipeline 2, 384 wide, alpha_0 = 1": ["model.hidden_size=384", "model.num_layers=8",
                                          "model.num_heads=6", "parallel.pipeline=2"],
    "data 2, 256 wide, alpha_0 = 0.25": ["model.hidden_size=256", "model.num_layers=6",
                                         "objective.alpha_0=0.25"],
}  # fmt: skip


def main() -> None:
    """Measure the runs and print the predictions beside the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder for the runs; finished ones are reused")
    parser.add_argument(
        "--cluster", type=hardware, default="cpu", help="hardware profile: name or YAML"
    )
    options = parser.parse_args()
    data = _prepare(options.folder)
    runs = [_measure(options.folder, data, name) for name in RUNS]
    print("| run | measured, s | predicted, s | error |\n|---|---|---|---|")
    for line in _predictions(runs, (0, 1), options.cluster):
        print(line)
    print("\n| calibrated on | largest error of the other three |\n|---|---|")
    for pair in itertools.combinations(range(len(runs)), 2):
        rows = _compare(runs, pair, options.cluster)
        print(
            f"| {'; '.join(runs[i].name for i in pair)} | {max(abs(r.error) for r in rows):.0%} |"
        )


def _predictions(runs: list[Measured], known: tuple[int, int], hardware: Hardware) -> list[str]:
    lines = [f"| {runs[i].name} | {runs[i].step_seconds:.2f} | calibrates | - |" for i in known]
    for row in _compare(runs, known, hardware):
        lines.append(
            f"| {row.name} | {row.measured_seconds:.2f} | {row.predicted_seconds:.2f} | {row.error:+.0%} |"
        )
    return lines


def _compare(runs: list[Measured], known: tuple[int, int], hardware: Hardware) -> list:
    fitted = replace(hardware, constants=fit_constants([runs[i] for i in known], hardware))
    return [compare(run, fitted) for i, run in enumerate(runs) if i not in known]


def _measure(folder: Path, data: Path, name: str) -> Measured:
    run = folder / "-".join(name.replace(",", "").replace("=", "").split())
    if not (run / "evaluation.json").is_file():
        config = folder / "run.yaml"
        config.write_text(f"data:\n  sources:\n    - path: {data / 'train'}\n")
        _run("train", str(config), f"folder={run}", *COMMON, *RUNS[name])
    return replace(read_measured(run)[0], name=name)


def _prepare(folder: Path) -> Path:
    """Return a data set of random words; the tokens do not change a step's time."""
    data, source = folder / "data", folder / "words.txt"
    if not (data / "train" / "manifest.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        draw = random.Random(1)
        words = [
            "".join(draw.choices("etaoinshrdlucmfw", k=draw.randint(2, 9))) for _ in range(9000)
        ]
        source.write_text(" ".join(draw.choices(words, k=400_000)))
        _run("data", "prepare", str(source), "--out", str(data), "--sequence-length", str(LENGTH),
             "--vocab-size", str(VOCABULARY), "--validation-fraction", "0")  # fmt: skip
    return data


def _run(*arguments: str) -> None:
    command = [sys.executable, "-m", "megatron_eso", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


if __name__ == "__main__":
    main()
