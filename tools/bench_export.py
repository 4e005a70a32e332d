"""Speed and memory of export and import: ``python -m tools.bench_export [--mib 1024]``.

A checkpoint of random float32 weights is written (as training leaves it, without moments), exported and
imported again, each in a process of its own on one core, beside `cp` of the checkpoint's file twice. Memory
is the peak resident set above that of a process that imports the same modules and does nothing.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from megatron_eso.checkpoint.folder import SIDECAR, CheckpointFolder
from megatron_eso.config import derive
from megatron_eso.config.schema import ModelConfig, ObjectiveConfig
from megatron_eso.export.mapping import rules
from megatron_eso.export.torch_dist_writer import TorchDistWriter

TASKS = ("nothing", "export", "export and verify", "import")
ROUNDS = 3  # each runs all tasks in turn; the shortest time and the largest peak count


def main() -> None:
    """Print speed and peak memory of each task."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="MiB of the checkpoint [1024]")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        run_task(options.task, options.folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        figures = compare(Path(scratch), options.mib)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


def compare(scratch: Path, mib: int, rounds: int = ROUNDS) -> dict[str, float]:
    """Return the seconds and peaks of all tasks; print them as well."""
    size, largest = write_checkpoint(scratch / "checkpoint", mib)
    print(f"checkpoint {size / 2**20:,.0f} MiB, largest tensor {largest / 2**20:,.0f} MiB")
    copying, seconds, peaks = [], {task: [] for task in TASKS}, dict.fromkeys(TASKS, 0.0)
    for _ in range(rounds):
        copying.append(copy_twice(scratch))
        for task in TASKS:
            found = in_a_process(task, scratch)
            seconds[task].append(found["seconds"])
            peaks[task] = max(peaks[task], found["peak_bytes"])
    print(f"copied twice: {min(copying):.2f} s (longest {max(copying):.2f})")
    figures = {"bytes": size, "largest_bytes": largest, "copy_twice_seconds": min(copying)}
    baseline = peaks["nothing"]
    for task in TASKS:
        best, above = min(seconds[task]), peaks[task] - baseline
        figures |= {f"{task} seconds": best, f"{task} bytes above baseline": above}
        if task != "nothing":
            print(
                f"{task}: {best:.2f} s (longest {max(seconds[task]):.2f}), {size / 1e6 / best:,.0f} MB/s, "
                f"peak {above / 2**20:,.0f} MiB above {baseline / 2**20:,.0f} MiB (3 x largest + 300 MiB "
                f"= {3 * largest / 2**20 + 300:,.0f})"
            )
    return figures


def copy_twice(scratch: Path) -> float:
    """Return the seconds that two copies of the checkpoint's file take."""
    begin = time.perf_counter()
    for _ in range(2):
        shutil.copyfile(scratch / "checkpoint" / "__0_0.distcp", scratch / "copy")
    return time.perf_counter() - begin


def in_a_process(task: str, scratch: Path) -> dict[str, float]:
    """Return the seconds and peak memory of one task, run in its own process."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench_export", "--task", task, "--folder", str(scratch)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(f"{task} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def run_task(task: str, scratch: Path) -> None:
    """Do one task and print its figures."""
    from megatron_eso.export.exporter import export
    from megatron_eso.export.hf import register
    from megatron_eso.export.import_hf import import_hf

    register()
    source, out = scratch / "checkpoint", scratch / "exported"
    begin = time.perf_counter()
    if task in ("export", "export and verify"):
        shutil.rmtree(out, ignore_errors=True)
        begin = time.perf_counter()
        export(source, out, verify=task.endswith("verify"))
    elif task == "import":
        shutil.rmtree(scratch / "imported", ignore_errors=True)
        begin = time.perf_counter()
        import_hf(out, scratch / "imported")
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak_bytes": peak}))


def write_checkpoint(folder: Path, mib: int) -> tuple[int, int]:
    """Write a checkpoint of about ``mib`` MiB; return its size and its largest tensor's, in bytes."""
    model = ModelConfig(
        hidden_size=1024, num_heads=16, vocab_size=32000, num_layers=1, max_length=1024
    )
    layers = max(1, round((mib * 2**20 - 2 * 4 * 32000 * 1024) / (4 * layer_numbers(model))))
    model = ModelConfig(**{**asdict(model), "num_layers": layers})
    folder.mkdir()
    total = largest = 0
    with TorchDistWriter(folder) as writer:
        for rule in rules(model):
            for layer in range(layers) if rule.is_layered else (None,):
                tensor = torch.randn(shape_of(model, rule.ours)) * 0.02
                writer.write(f"weights.{rule.ours}", tensor, layer=layer, num_layers=layers)
                total, largest = total + tensor.nbytes, max(largest, tensor.nbytes)
    sidecar = {"format_version": 1, "step": 0, "has_ema": False, "model": asdict(model),
               "objective": asdict(ObjectiveConfig()), "sequence_length": 1024, "tokenizer": None,
               "origin": {}}  # fmt: skip
    (folder / SIDECAR).write_text(json.dumps(sidecar))
    CheckpointFolder(folder).commit()
    return total, largest


def layer_numbers(model: ModelConfig) -> int:
    """Return the numbers of one layer."""
    return sum(torch.Size(shape_of(model, r.ours)).numel() for r in rules(model) if r.is_layered)


def shape_of(model: ModelConfig, name: str) -> tuple[int, ...]:
    """Return the shape of one layer's part of one of our tensors."""
    hidden, inner = model.hidden_size, derive.ffn_size(model)
    if name.endswith("norm.weight") or name.endswith("norm_weight"):
        return (hidden,)
    if "linear_qkv" in name:
        return (3 * hidden, hidden)
    if "linear_fc1" in name:
        return (2 * inner, hidden)
    if "linear_fc2" in name:
        return (hidden, inner)
    rows = hidden if "linear_proj" in name else derive.padded_vocab_size(model)
    return (rows, hidden)


if __name__ == "__main__":
    main()
