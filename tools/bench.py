"""Speed and memory of training on this machine, as ratios measured in one run.

    python -m tools.bench            all cases, as tables (make bench)
    python -m tools.bench --case X   one case, as JSON (what the tables are made of)

Each case runs in a process of its own, so that its peak memory is its own; cases that are compared run
in turn, twice, and the faster time counts.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch

OURS_512 = {"hidden": 512, "vocab": 8192, "rows": 8, "dtype": "fp32"}
OURS_256 = {"hidden": 256, "rows": 4, "dtype": "fp32"}
CASES: dict[str, dict] = {
    "ar": {**OURS_512, "objective": ["objective.name=ar"]},
    "alpha_0=1": {**OURS_512, "objective": ["objective.alpha_0=1"]},
    "alpha_0=0.25": {**OURS_512, "objective": ["objective.alpha_0=0.25"]},
}
for _name in ("ar", "eso"):  # one order of the likelihood costs two rows where AR costs one
    CASES[f"score {_name}"] = {**OURS_512, "score": True, "objective": [f"objective.name={_name}"]}
for _vocab in (8192, 50258):
    for _alpha in ("1", "0.25"):
        CASES[f"ours V={_vocab} alpha_0={_alpha}"] = {
            **OURS_256, "vocab": _vocab, "objective": [f"objective.alpha_0={_alpha}"],
        }  # fmt: skip
        CASES[f"official V={_vocab} alpha_0={_alpha}"] = {
            **OURS_256, "vocab": _vocab, "official": float(_alpha),
        }  # fmt: skip
LENGTH, LAYERS, STEPS = 512, 6, 3


def main() -> None:
    """Run one case or print all tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, help="measure only this, as JSON [all, as tables]")
    case = parser.parse_args().case
    if case:
        print(json.dumps(measure(CASES[case])))
        return
    results = measure_all()
    print(f"{torch.get_num_threads()} threads, float32, L = {LENGTH}, {LAYERS} layers\n")
    _objectives_table(results)
    _scoring_table(results)
    _official_table(results)


def measure(case: dict) -> dict[str, float]:
    """Return tokens/s, FLOP/s, matmul FLOP/s and peak memory of a case, in this process."""
    step = _official_step(case) if "official" in case else _our_step(case)
    before = resident_gib()
    step()
    times = []
    for _ in range(STEPS):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    seconds = min(times)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "tokens_per_second": case["rows"] * LENGTH / seconds,
        "seconds": seconds,
        "peak_gib": peak,
        "step_gib": peak - before,
        **_flops(case, seconds),
    }


def resident_gib() -> float:
    """Return this process's current memory: Python, its libraries, and the weights just created."""
    import psutil

    return psutil.Process().memory_info().rss / 2**30


def measure_all() -> dict[str, dict[str, float]]:
    """Return the better of two rounds of each case."""
    results: dict[str, dict[str, float]] = {}
    for _ in range(2):
        for name in CASES:
            command = [sys.executable, "-m", "tools.bench", "--case", name]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr}")
            found = json.loads(done.stdout.splitlines()[-1])
            if name not in results or found["seconds"] < results[name]["seconds"]:
                results[name] = found
    return results


def _our_step(case: dict) -> Callable[[], object]:
    from megatron_eso.config import load_config
    from megatron_eso.launch.environment import Ranks
    from megatron_eso.parallel.exchange import Rows
    from megatron_eso.train.session import build_session
    from megatron_eso.train.step import train_step

    stack_rows = (
        case["rows"] * 3 // 2 if "objective.alpha_0=0.25" in case["objective"] else case["rows"]
    )
    config = load_config(
        None,
        [
            f"model.hidden_size={case['hidden']}", f"model.num_layers={LAYERS}",
            f"model.num_heads={case['hidden'] // 64}", f"model.vocab_size={case['vocab']}",
            f"train.sequence_length={LENGTH}", "train.steps=100",
            f"train.global_batch_rows={case['rows']}", f"train.micro_batch_rows={stack_rows}",
            f"precision.dtype={case['dtype']}", *case["objective"],
        ],
    )  # fmt: skip
    session = build_session(config, Ranks(0, 1, 0))

    def read(step: int, rows: list[int]) -> Rows:
        tokens = torch.randint(0, case["vocab"] - 1, (len(rows), LENGTH + 1))
        return Rows(tokens, torch.ones_like(tokens, dtype=torch.bool))

    if "score" not in case:
        return lambda: train_step(session, read)

    from megatron_eso.eval.evaluate import evaluate

    def score() -> object:
        return evaluate(
            session.replica, lambda rows: read(0, rows), num_rows=case["rows"], bytes_per_token=1.0,
            metrics=["likelihood"],
        )  # fmt: skip

    return score


def _official_step(case: dict) -> Callable[[], object]:
    from megatron_eso.config.schema import ModelConfig
    from tools.official_scheme import OfficialScheme

    alpha_0, rows = case["official"], case["rows"]
    shape = ModelConfig(
        hidden_size=case["hidden"], num_layers=LAYERS, num_heads=case["hidden"] // 64,
        vocab_size=case["vocab"],
    )  # fmt: skip
    model = OfficialScheme(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        tokens = torch.randint(0, case["vocab"] - 1, (rows, LENGTH))
        num_diffusion = rows if alpha_0 == 1 else rows // 2
        keep = alpha_0 * (1 - torch.rand(num_diffusion, 1))
        loss = _official_pass(model, tokens[:num_diffusion], keep, sequential=False)
        if num_diffusion < rows:
            keep = torch.full((rows - num_diffusion, 1), alpha_0)
            loss = loss + _official_pass(model, tokens[num_diffusion:], keep, sequential=True)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def _official_pass(model, tokens, keep, *, sequential: bool) -> torch.Tensor:
    masked = torch.rand(tokens.shape) >= keep
    key = torch.rand(tokens.shape)
    if sequential:
        key = torch.where(masked, torch.arange(tokens.shape[1]) / tokens.shape[1], key)
    order = (key + masked).argsort(dim=1)
    return model.loss(tokens, masked, order, sequential=sequential)


def _flops(case: dict, seconds: float) -> dict[str, float]:
    if "official" in case or "score" in case:
        return {}
    from megatron_eso.config import load_config
    from megatron_eso.parallel.matmul_speed import matmul_flops_per_second
    from megatron_eso.plan.flops import model_flops_per_step

    config = load_config(
        None,
        [
            f"model.hidden_size={case['hidden']}", f"model.num_layers={LAYERS}",
            f"model.num_heads={case['hidden'] // 64}", f"model.vocab_size={case['vocab']}",
            *case["objective"],
        ],
    )  # fmt: skip
    flops = model_flops_per_step(
        config.model, config.objective, sequence_length=LENGTH, rows=case["rows"]
    )
    peak = matmul_flops_per_second(torch.float32, torch.device("cpu"), seconds=1.0)
    return {"flops_per_second": flops.training / seconds, "matmul_flops_per_second": peak}


def _objectives_table(results: dict[str, dict[str, float]]) -> None:
    print(
        "| objective (512 wide, V = 8192) | tokens/s | x AR | GFLOP/s | share of matmul | peak GiB |"
    )
    print("|---|---|---|---|---|---|")
    base = results["ar"]["tokens_per_second"]
    for name in ("ar", "alpha_0=1", "alpha_0=0.25"):
        r = results[name]
        share = r["flops_per_second"] / r["matmul_flops_per_second"]
        print(
            f"| {name} | {r['tokens_per_second']:,.0f} | {r['tokens_per_second'] / base:.2f} "
            f"| {r['flops_per_second'] / 1e9:.0f} | {share:.0%} | {r['peak_gib']:.2f} |"
        )


def _scoring_table(results: dict[str, dict[str, float]]) -> None:
    ar, eso = results["score ar"]["seconds"], results["score eso"]["seconds"]
    rows = OURS_512["rows"]
    print(f"\nexact likelihood of {rows} rows under one order: {eso:.2f} s, AR forward {ar:.2f} s,"
          f" ratio {eso / ar:.2f}")  # fmt: skip


def _official_table(results: dict[str, dict[str, float]]) -> None:
    print(
        "\n| 256 wide | ours tokens/s | official scheme | speed ratio | peak GiB of the process |"
        " added by the step, GiB |"
    )
    print("|---|---|---|---|---|---|")
    for vocab in (8192, 50258):
        for alpha in ("1", "0.25"):
            ours = results[f"ours V={vocab} alpha_0={alpha}"]
            theirs = results[f"official V={vocab} alpha_0={alpha}"]
            speed = ours["tokens_per_second"] / theirs["tokens_per_second"]
            print(
                f"| V = {vocab}, alpha_0 = {alpha} | {ours['tokens_per_second']:,.0f} "
                f"| {theirs['tokens_per_second']:,.0f} | {speed:.2f} "
                f"| {_ratio(ours, theirs, 'peak_gib')} | {_ratio(ours, theirs, 'step_gib')} |"
            )


def _ratio(ours: dict[str, float], theirs: dict[str, float], name: str) -> str:
    return f"{ours[name]:.2f} / {theirs[name]:.2f} = {ours[name] / theirs[name]:.2f}"


if __name__ == "__main__":
    main()
