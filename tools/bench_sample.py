"""Sampling speed on this machine: Eso-LM against AR, MDLM and BD3-LM on one untrained model, as ratios.

    python -m tools.bench_sample            all tables (minutes; MDLM's steps are timed on a subset)
    python -m tools.bench_sample --length 1024   one length

All methods run the same weights through `megatron_eso.sample`, one after the other in one process, twice,
and the faster time counts. MDLM at one token per step does the same work in every step, so a few steps
are timed and multiplied; the table says how many.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from megatron_eso.config import load_config
from megatron_eso.launch.environment import Ranks
from megatron_eso.model.replica import Replica
from megatron_eso.sample.generate import plan_for
from megatron_eso.sample.plan import DecodingPlan
from megatron_eso.sample.prompt import rows_with_prompts
from megatron_eso.sample.sampler import Choice, fill_rows
from megatron_eso.sample.settings import PlanSettings
from megatron_eso.train.session import build_session

MODEL = [
    "model.hidden_size=384",
    "model.num_layers=8",
    "model.num_heads=6",
    "model.vocab_size=8192",
]
TIMED_STEPS = 6


@dataclass(frozen=True)
class Method:
    """A sampler to time."""

    label: str
    objective: str
    settings: PlanSettings
    rows: int = 1
    is_subset: bool = False
    """Time TIMED_STEPS steps, spread over the row, and multiply."""


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--length", type=int, action="append", choices=(1024, 2048, 4096),
        help="tokens of a row; repeatable [all]",
    )  # fmt: skip
    lengths = parser.parse_args().length or [1024, 2048, 4096]
    replica = make_model(max(lengths))
    print(f"{torch.get_num_threads()} threads, float32, 384 wide x 8 layers, V = 8192")
    for length in lengths:
        print(
            f"\nL = {length}\n\n| method | batch | passes | seconds | tokens/s | seconds / Eso-LM's |"
        )
        print("|---|---|---|---|---|---|")
        found = [(m, *measure(replica, m, length)) for m in methods(length)]
        base = found[0][2]
        for method, passes, seconds in found:
            note = f" ({TIMED_STEPS} steps timed)" if method.is_subset else ""
            print(
                f"| {method.label}{note} | {method.rows} | {passes} | {seconds:.2f} "
                f"| {method.rows * length / seconds:,.0f} | {seconds / base:.2f} |",
                flush=True,
            )


def methods(length: int) -> list[Method]:
    """Return the methods to time at a length; Eso-LM with one token per step comes first."""
    one = PlanSettings(alpha_0=1.0, method="fixed", num_steps=length)
    each = PlanSettings(method="fixed", num_steps=length)
    found = [
        Method("Eso-LM, one token per step", "eso", one),
        Method("AR with cache", "ar", PlanSettings()),
        Method("MDLM, one token per step", "mdlm", each, is_subset=True),
        Method("BD3-LM(16), one token per step", "bd3lm", each),
    ]  # fmt: skip
    if length == 2048:
        eight = replace(one, num_steps=length // 8)
        many = replace(one, num_steps=length // 32)
        found += [
            Method("Eso-LM, 8 tokens per step", "eso", eight),
            Method("Eso-LM, 32 tokens per step", "eso", many, rows=16),
            Method("AR with cache", "ar", PlanSettings(), rows=16),
        ]
    return found


def make_model(max_length: int) -> Replica:
    """Return a replica with random weights."""
    settings = [
        *MODEL, f"model.max_length={max_length + 1}", "train.sequence_length=1024", "train.steps=1",
        "train.global_batch_rows=1", "train.micro_batch_rows=1", "precision.dtype=fp32",
    ]  # fmt: skip
    session = build_session(load_config(None, settings), Ranks(0, 1, 0), for_training=False)
    return session.replica


def measure(replica: Replica, method: Method, length: int) -> tuple[int, float]:
    """Return the number of passes and the seconds of a method."""
    objective = replace(replica.config.objective, name=method.objective, block_size=16)
    replica = replace(replica, config=replace(replica.config, objective=objective))
    canvas = rows_with_prompts([[]] * method.rows, length, replica.config.model)
    choice = Choice(seed=1)
    plan = plan_for(replica.config.objective, canvas, method.settings, choice)
    if method.is_subset:
        return plan.num_evaluations, min(_subset(replica, canvas, plan) for _ in range(2))

    def run() -> object:
        return fill_rows(replica, canvas.tokens, plan, choice)

    return plan.num_evaluations, min(_seconds(run) for _ in range(2))


def _subset(replica: Replica, canvas: object, plan: DecodingPlan) -> float:
    """Return the seconds of all steps, estimated from TIMED_STEPS of them, evenly spread over the row."""
    total = 0.0
    number = plan.num_evaluations
    for part in range(TIMED_STEPS):
        step = number * (2 * part + 1) // (2 * TIMED_STEPS)
        done = plan.num_given + sum(plan.counts[:step])
        one = DecodingPlan(plan.order, done, plan.counts[step : step + 1])
        rows = torch.zeros_like(plan.order)
        total += _time_last_step(replica, rows, one)
    return total / TIMED_STEPS * number


def _time_last_step(replica: Replica, rows: torch.Tensor, plan: DecodingPlan) -> float:
    """Return the seconds of a plan's single step, without the pass that fills the cache before it."""
    from megatron_eso.sample.decoders import make_decoder

    decoder = make_decoder(replica, plan, torch.zeros(len(rows), dtype=torch.int64))
    fresh, open_ = (
        plan.order[:, : plan.num_given],
        plan.order[:, plan.num_given :][:, : plan.counts[0]],
    )
    with torch.no_grad():
        decoder.logits(rows, fresh, open_)
        return min(_seconds(lambda: decoder.logits(rows, fresh[:, :0], open_)) for _ in range(2))


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
