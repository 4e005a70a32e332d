"""Speed of the data layer, as ratios measured side by side in one run: ``python -m tools.bench_data``.

Reading: rows in shuffled order through our reader without worker threads, np.memmap over one flat file
of the same tokens in the same order, and streaming's own StreamingDataset. Preparing: `data prepare`
against the tokenizer alone on as many processes. Waiting: the share of the quick start's steps that
waits for data. Order: time and memory until the first row of a resumed run of 10 and 50 million
samples. Rounds alternate, the best of each counts. A name (reading, preparing, waiting, order) runs
that part alone.
"""

import argparse
import json
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_eso.config.schema import DataConfig, DataSourceConfig
from megatron_eso.data.manifest import Manifest, sha256_of
from megatron_eso.data.partition import PrepareOptions
from megatron_eso.data.prepare import prepare
from megatron_eso.data.reader import RowReader
from megatron_eso.data.row_writer import RowWriter
from megatron_eso.data.sources import STDLIB, find_files
from megatron_eso.data.tokenizer import Tokenizer

LENGTH, BATCH, NUM_ROWS, ROUNDS = 2048, 8, 24_000, 3
VOCAB_SIZE = 32768
COPIES = 4  # of the text to prepare: enough parts to keep every process busy to the end
SAMPLES_OF_A_SHARD = 16384
PARTS = ("reading", "preparing", "waiting", "order")


def main(parts: list[str]) -> None:
    """Run the given benchmarks, or all if none is given, and print their results."""
    benches = {"reading": bench_reading, "preparing": bench_preparing, "waiting": bench_waiting}
    for name, bench in benches.items():
        if not parts or name in parts:
            with tempfile.TemporaryDirectory() as folder:
                bench(Path(folder))
    if not parts or "order" in parts:
        for num_samples in (10_000_000, 50_000_000):
            bench_order(num_samples)


def _parts(arguments: list[str]) -> list[str]:
    """Return the requested parts."""

    def part(name: str) -> str:
        if name not in PARTS:
            raise argparse.ArgumentTypeError(f"'{name}' is none of {', '.join(PARTS)}")
        return name

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="*", type=part, help=f"{', '.join(PARTS)} [all]")
    return parser.parse_args(arguments).part


def bench_reading(folder: Path) -> None:
    """Print million tokens per second of the three readers."""
    split, flat = write_rows(folder)
    data = DataConfig(sources=[DataSourceConfig(str(split))], num_workers=0)
    reader = RowReader(
        data, sequence_length=LENGTH, vocab_size=VOCAB_SIZE, global_batch_rows=BATCH, seed=1
    )
    steps = NUM_ROWS // BATCH
    order = [
        [sample for _, sample in reader.samples_of(step, range(BATCH))] for step in range(steps)
    ]
    mapped = np.memmap(flat, np.uint16, mode="r").reshape(-1, LENGTH + 1)

    def ours() -> None:
        for step in range(steps):
            reader.read(step, range(BATCH))

    def memmap() -> None:
        for samples in order:
            mapped[samples].astype(np.int64)

    readers = {"our reader": ours, "np.memmap": memmap}
    # CPU time, with one thread each: another job on the machine does not change it.
    speeds = best_of(readers, NUM_ROWS * (LENGTH + 1), time.process_time)
    speeds["StreamingDataset"] = streaming_speed(split)
    for name, speed in speeds.items():
        print(f"reading, {name}: {speed / 1e6:.1f} M tokens/s")
    print(f"reading, ours / np.memmap: {speeds['our reader'] / speeds['np.memmap']:.2f} (aim 0.5)")
    ratio = speeds["our reader"] / speeds["StreamingDataset"]
    print(f"reading, ours / StreamingDataset: {ratio:.1f} (aim 10)")


def bench_preparing(folder: Path) -> None:
    """Print tokens per second of `data prepare` and of the tokenizer alone."""
    prepare([STDLIB], folder / "small", PrepareOptions(256, 4096))
    tokenizer = folder / "small" / "tokenizer.json"
    texts = [Path(piece.path).read_text(errors="replace") for piece in find_files([STDLIB])]
    texts *= COPIES
    lines = folder / "texts.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    processes = multiprocessing.cpu_count()

    def ours() -> None:
        shutil.rmtree(folder / "set", ignore_errors=True)
        options = PrepareOptions(256, 4096, validation_fraction=0.01)
        prepare([str(lines)], folder / "set", options, tokenizer=str(tokenizer))

    def alone() -> None:
        parts = [texts[number::processes] for number in range(processes)]
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            pool.starmap(tokenize, [(str(tokenizer), part) for part in parts])

    num_tokens = COPIES * sum(manifest_tokens(folder / "small"))
    speeds = best_of({"data prepare": ours, "tokenizer alone": alone}, num_tokens)
    for name, speed in speeds.items():
        print(f"preparing, {name}, {processes} processes: {speed / 1e6:.2f} M tokens/s")
    ratio = speeds["data prepare"] / speeds["tokenizer alone"]
    print(f"preparing, data prepare / tokenizer alone: {ratio:.2f} (aim 0.9)")


def bench_waiting(folder: Path) -> None:
    """Print the share of a step that waits for data, over the second half of the quick start's steps."""
    prepare([STDLIB], folder / "set", PrepareOptions(128, 2048))
    command = [
        sys.executable, "-m", "megatron_eso", "train", "configs/run/quickstart.yaml",
        f"folder={folder / 'run'}", f"data.sources=[{{path: '{folder}/set/train'}}]",
        f"data.validation={{stdlib: '{folder}/set/validation'}}", "train.steps=60",
        "train.log_every_steps=10", "train.eval_every_steps=null", "eval.num_rows=4",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [one for line in lines if "loss" in (one := json.loads(line)) and one["step"] > 30]
    share = statistics.mean(one["share_waiting_for_data"] for one in steps)
    print(f"quick start: {share:.2%} of a step waits for data (aim: below 1 %)")


ORDER = """
import resource, sys, time
import numpy as np
from megatron_eso.data.order import SampleOrder
num_samples, of_shard = int(sys.argv[1]), int(sys.argv[2])
begin = time.perf_counter()
order = SampleOrder([of_shard] * (num_samples // of_shard), seed=1)
order.samples_at(np.arange(num_samples // 2, num_samples // 2 + 32))
seconds = time.perf_counter() - begin
for place in range(0, 8 << 20, 1 << 18):
    order.samples_at(np.arange(place, place + 32))
print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def bench_order(num_samples: int) -> None:
    """Print the time to the first rows of a resumed run, and memory of a process with only the order."""
    command = [sys.executable, "-c", ORDER, str(num_samples), str(SAMPLES_OF_A_SHARD)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds, memory = map(float, output.split())
    print(
        f"order of {num_samples / 1e6:.0f} M samples: resumed in {seconds:.2f} s (aim 1), "
        f"{memory:.0f} MiB in the process (aim 200)"
    )


def best_of(
    rounds: dict[str, Callable[[], None]],
    num_tokens: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Return the best tokens per second of each function; they take turns."""
    seconds = shortest_in_turn(rounds, ROUNDS, clock)
    return {name: num_tokens / best for name, best in seconds.items()}


def write_rows(folder: Path) -> tuple[Path, Path]:
    """Write random tokens as a split and as one flat file."""
    split, flat = folder / "train", folder / "flat.bin"
    random = np.random.default_rng(0)
    with (
        flat.open("wb") as file,
        RowWriter(
            split, dtype="uint16", row_tokens=LENGTH + 1, shard_bytes=64 << 20, zstd=False
        ) as writer,
    ):
        for _ in range(NUM_ROWS):
            row = random.integers(0, VOCAB_SIZE - 1, LENGTH + 1).astype(np.uint16)
            file.write(row.tobytes())
            writer.write(row[None])
    num_shards = len(list(split.glob("*.mds")))
    Manifest(
        "train", "tokenizer.json", "", VOCAB_SIZE, LENGTH, "uint16", "packed", 0, NUM_ROWS,
        NUM_ROWS * LENGTH, NUM_ROWS, 1, 0, num_shards, sha256_of(split / "index.json"),
    ).save(split)  # fmt: skip
    return split, flat


STREAMING = """
import sys, time
from megatron_eso.data import streaming_shim
from tools.turns import shortest_in_turn
dataset = streaming_shim.load("dataset").StreamingDataset(
    local=sys.argv[1], shuffle=True, batch_size=8, num_canonical_nodes=1)
rows, begin = 0, time.process_time()
for sample in dataset:
    rows += len(sample["tokens"])
    if time.process_time() - begin > 4:
        break
print(rows / (time.process_time() - begin))
"""


def streaming_speed(split: Path) -> float:
    """Return tokens per second of streaming's own iteration, in a separate process."""
    command = [sys.executable, "-W", "ignore", "-c", STREAMING, str(split)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.split()[-1])


def tokenize(path: str, texts: list[str]) -> int:
    """Return the number of tokens in some texts (the work of one process of the comparison)."""
    import os

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer(Path(path))
    return sum(len(tokens) for text in texts for tokens in tokenizer.encode_pieces([text]))


def manifest_tokens(folder: Path) -> list[int]:
    """Return the number of tokens in the splits of a prepared folder."""
    manifests = [json.loads((folder / split / "manifest.json").read_text())
                 for split in ("train", "validation")]  # fmt: skip
    return [manifest["num_tokens"] for manifest in manifests]


if __name__ == "__main__":
    main(_parts(sys.argv[1:]))
