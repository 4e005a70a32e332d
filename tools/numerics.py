"""The paper's claim at a size anyone can check: each objective on tiny Shakespeare, a table and a plot.

    python -m tools.numerics --text tinyshakespeare.txt [--out runs/numerics] [--seeds 3] [--jobs 1]

Trains the nanoGPT CPU recipe (configs/run/tiny_shakespeare.yaml) with each objective and seed on the first
90 % of the characters, scores the last 10 % (or eval.num_rows of its rows, where that is overridden), and
writes numerics.json, numerics.md and numerics.png. Runs that are finished are kept, so the command can be
stopped and given again; other overrides are other runs.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_eso.files import require_room, write_figure, write_json, write_whole
from tools.arguments import at_least_1, text_file

CONFIG = Path(__file__).parent.parent / "configs" / "run" / "tiny_shakespeare.yaml"
LIKELIHOOD_ROWS, ORDERS = 128, 100
# Stack rows of a batch of 12: a sequential or block row takes two, a diffusion or AR row one.
OBJECTIVES: dict[str, list[str]] = {
    "AR, first token given (nanoGPT)": ["objective.name=ar", "objective.leading_mask=false"],
    "AR": ["objective.name=ar"],
    "Eso-LM, alpha_0 = 0": ["objective.alpha_0=0", "train.micro_batch_rows=24"],
    "Eso-LM, alpha_0 = 0.125": ["objective.alpha_0=0.125", "train.micro_batch_rows=18"],
    "Eso-LM, alpha_0 = 0.25": ["objective.alpha_0=0.25", "train.micro_batch_rows=18"],
    "Eso-LM, alpha_0 = 0.5": ["objective.alpha_0=0.5", "train.micro_batch_rows=18"],
    "Eso-LM, alpha_0 = 1": ["objective.alpha_0=1"],
    "BD3-LM, blocks of 4": [
        "objective.name=bd3lm", "objective.block_size=4", "train.micro_batch_rows=24",
    ],
    "BD3-LM, blocks of 16": [
        "objective.name=bd3lm", "objective.block_size=16", "train.micro_batch_rows=24",
    ],
    "MDLM": ["objective.name=mdlm"],
}  # fmt: skip


def main() -> None:
    """Prepare data, train, score, and show the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=text_file, required=True, help="tinyshakespeare.txt")
    parser.add_argument("--out", type=Path, default=Path("runs/numerics"),
                        help="folder for the runs and the table [runs/numerics]")  # fmt: skip
    parser.add_argument("--seeds", type=at_least_1, default=3, help="seeds per objective [3]")
    parser.add_argument("--jobs", type=at_least_1, default=1, help="runs at a time [1]")
    parser.add_argument("--override", nargs="*", default=[], help="section.key=value for every run")
    options = parser.parse_args()
    prepare(options.text, options.out)
    # Seeds in the outer loop, so that a first complete table comes early.
    cells = [(name, seed) for seed in range(1, options.seeds + 1) for name in OBJECTIVES]
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = [
            pool.submit(run_cell, name, seed, options.out, options.override) for name, seed in cells
        ]
        try:
            for (name, seed), future in zip(cells, futures, strict=True):
                scores = future.result()
                print(f"{name}, seed {seed}: " + describe(scores), flush=True)
        except BaseException:  # after Ctrl-C or a failed cell, start no further cell
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    table = collect(options.out, options.seeds, options.override)
    write_json(options.out / "numerics.json", table)
    write_whole(options.out / "numerics.md", as_markdown(table))
    plot(table, options.out / "numerics.png")
    print(as_markdown(table))


def prepare(text: Path, out: Path) -> None:
    """Write both parts of the text, a tokenizer for its characters, and the training shards."""
    whole = text.read_text()
    cut = int(0.9 * len(whole))
    try:
        out.mkdir(parents=True, exist_ok=True)
        require_room(out)
    except OSError as error:
        raise SystemExit(f"--out {out} cannot be written: {error.strerror}") from None
    for name, part in (("train", whole[:cut]), ("validation", whole[cut:])):
        file = out / f"{name}.txt"
        if file.is_file() and file.read_text() != part:
            raise SystemExit(
                f"--out {out} holds runs of another text than --text {text}: give another --out"
            )
        write_whole(file, part)
    write_character_tokenizer(sorted(set(whole)), out / "tokenizer.json")
    command(
        "data", "prepare", out / "train.txt", "--out", out / "data", "--sequence-length", 64,
        "--tokenizer", out / "tokenizer.json", "--validation-fraction", 0, "--processes", 1,
    )  # fmt: skip


def write_character_tokenizer(characters: list[str], path: Path) -> None:
    """Write a tokenizer with a token per character and an end-of-document token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    from megatron_eso.data.tokenizer import END_OF_DOCUMENT

    known = {character: number for number, character in enumerate(characters)}
    core = Tokenizer(models.WordLevel({**known, END_OF_DOCUMENT: len(known)}, END_OF_DOCUMENT))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([END_OF_DOCUMENT])
    write_whole(path, core.to_str(pretty=True))


def run_cell(name: str, seed: int, out: Path, overrides: list[str]) -> list[dict]:
    """Train and score one objective with one seed, unless this was already done; return its scores."""
    folder = cell_folder(out, name, seed, overrides)
    every, some = folder / "scores.json", folder / "likelihood.json"
    if not every.is_file() or (name.startswith("Eso") and not some.is_file()):
        command(
            "train", CONFIG, *OBJECTIVES[name], f"train.seed={seed}", f"folder={folder}",
            f"data.sources=[{{path: {out / 'data' / 'train'}}}]",
            f"model.vocab_size={vocabulary(out / 'tokenizer.json')}", *overrides,
        )  # fmt: skip
        text = out / "validation.txt"
        score = ("eval", folder, text, "--tokenizer", out / "tokenizer.json", "--batch", 64)
        rows = rows_to_score(overrides)
        if name.startswith("Eso"):
            fewest = min(rows or LIKELIHOOD_ROWS, LIKELIHOOD_ROWS)
            bounds = ("--metric", "likelihood", "--orders", ORDERS, "--rows", fewest)
            command(*score, *bounds, "--json", some)
        command(*score, "--repeats", 2, "--rows", rows, "--json", every)
    return json.loads(every.read_text())


def vocabulary(tokenizer: Path) -> int:
    """Return the number of a character tokenizer's tokens, with the mask token."""
    return len(json.loads(tokenizer.read_text())["model"]["vocab"]) + 1


def rows_to_score(overrides: list[str]) -> int:
    """Return eval.num_rows where it is overridden, else 0: all rows."""
    given = [
        text for key, _, text in (o.partition("=") for o in overrides) if key == "eval.num_rows"
    ]
    return int(given[-1]) if given else 0


def cell_folder(out: Path, name: str, seed: int, overrides: list[str]) -> Path:
    """Return the folder of a run; it depends on objective, seed and overrides."""
    short = "".join(c if c.isalnum() or c == "." else "-" for c in name)
    changed = hashlib.sha256("\n".join(overrides).encode()).hexdigest()[:8] if overrides else ""
    return out / "-".join(filter(None, (short, f"seed{seed}", changed)))


def command(*words: object) -> None:
    """Run a megatron-eso command; stop with its output if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_eso", *map(str, words)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"megatron-eso {' '.join(map(str, words))}\n{done.stdout}{done.stderr}")


def describe(scores: list[dict]) -> str:
    """Return the scores as one line."""
    return ", ".join(f"{s['metric']} {s['nats_per_token']:.4f}" for s in scores)


def collect(out: Path, seeds: int, overrides: list[str]) -> list[dict]:
    """Return one row per objective: mean and spread of every score over the seeds."""
    table = []
    for name in OBJECTIVES:
        found: dict[str, list[float]] = {}
        for seed in range(1, seeds + 1):
            folder = cell_folder(out, name, seed, overrides)
            scores = {"": json.loads((folder / "scores.json").read_text())}
            if (folder / "likelihood.json").is_file():
                some = json.loads((folder / "likelihood.json").read_text())
                scores[f", {some[0]['num_rows']} rows"] = some
            for suffix, part in scores.items():
                # At alpha_0 = 0 the NELBO is the likelihood and both have that name; count one of them.
                for metric, nats in {s["metric"]: s["nats_per_token"] for s in part}.items():
                    found.setdefault(metric + suffix, []).append(nats)
        table.append(
            {
                "objective": name,
                "scores": {
                    metric: {"mean": statistics.mean(v), "spread": max(v) - min(v), "seeds": v}
                    for metric, v in found.items()
                },
            }
        )
    return table


def as_markdown(table: list[dict]) -> str:
    """Return the table of means and spreads."""
    counted = [metric for row in table for metric in row["scores"] if metric.endswith(" rows")]
    some = counted[0].rpartition(", ")[2] if counted else f"{LIKELIHOOD_ROWS} rows"
    columns = {
        "NELBO": ("nelbo", "likelihood"),
        "likelihood, K = 1": ("likelihood bound, K = 1", "likelihood"),
        **{
            f"K = {k}, {some}": (f"likelihood bound, K = {k}, {some}", f"likelihood, {some}")
            for k in (1, 10, 100)
        },
    }
    lines = ["| objective | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in table:
        cells = []
        for names in columns.values():
            score = next((row["scores"][n] for n in names if n in row["scores"]), None)
            cells.append(f"{score['mean']:.3f} ({score['spread']:.3f})" if score else "-")
        lines.append(f"| {row['objective']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(table: list[dict], path: Path) -> None:
    """Draw the scores of Eso-LM over alpha_0, with the baselines as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    rows = {row["objective"]: row["scores"] for row in table}
    alphas = [0.0, 0.125, 0.25, 0.5, 1.0]
    scores = [rows[f"Eso-LM, alpha_0 = {alpha:g}"] for alpha in alphas]
    bound = [s.get("nelbo", s.get("likelihood")) for s in scores]
    for number in range(len(bound[0]["seeds"])):
        axes.plot(alphas, [b["seeds"][number] for b in bound], ".", color="C0", alpha=0.5)
    axes.plot(alphas, [b["mean"] for b in bound], "-", color="C0", label="Eso-LM, NELBO")
    exact = [s.get("likelihood bound, K = 1", s.get("likelihood")) for s in scores]
    axes.plot(alphas, [e["mean"] for e in exact], "--", color="C1", label="Eso-LM, one order")
    lines = ["AR", "BD3-LM, blocks of 4", "BD3-LM, blocks of 16", "MDLM"]
    for number, name in enumerate(lines, start=2):
        score = rows[name].get("nelbo", rows[name].get("likelihood"))
        axes.axhline(score["mean"], color=f"C{number}", linewidth=1, label=name)
    axes.set_xlabel("alpha_0: share of tokens made by diffusion")
    axes.set_ylabel("held-out nats per character")
    axes.legend(frameon=False)
    figure.tight_layout()
    write_figure(path, figure, dpi=150)


if __name__ == "__main__":
    main()
