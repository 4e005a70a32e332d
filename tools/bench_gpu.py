"""Everything that a GPU must show, in one table: right first, then fast.

    python -m tools.bench_gpu --out gpu.json       all sections, over 15 minutes on one GPU
    python -m tools.bench_gpu --section training --shape 1B --length 16384 --out gpu.json
                                                   a part of them (each may be repeated)
    python -m tools.bench_gpu --smoke              tiny shapes, on a CPU too: that it runs, not how fast

Results are printed as they come and kept in --out (JSON), which `megatron-eso plan --calibrate` reads. What
does not fit the memory, or what this machine does not have, says so in its place. Aims stand beside what
they are for.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_eso.config import load_config
from megatron_eso.config.precision_rules import DPA_RECIPE, process_environment
from megatron_eso.errors import ConfigError
from megatron_eso.garbage import look_at_new_objects
from megatron_eso.model.attention.dense import dense_attention
from megatron_eso.model.attention.flex import flex_rows_attention
from megatron_eso.model.attention.split import split_attention
from megatron_eso.parallel.finish import finish
from megatron_eso.parallel.matmul_speed import matmul_flops_per_second
from megatron_eso.parallel.vocabulary_loss import Head, target_log_probs
from megatron_eso.plan.flops import model_flops_per_step
from megatron_eso.plan.peaks import peak_of
from megatron_eso.train.session import Session
from megatron_eso.train.step import train_step
from tools.bench_gpu_fp8 import fp8, fp8_losses
from tools.bench_gpu_parts import (
    DEVICE,
    FP8_ATTENTION,
    HAS_TE,
    ON_GPU,
    as_official,
    attention_inputs,
    batch_settings,
    best_seconds,
    change_batch,
    counting_rows,
    device_seconds,
    forward_backward,
    free_memory,
    make_session,
    official_attention,
    outputs_and_gradients,
    random_rows,
    ratio,
    relative_error,
    reset_peak_memory,
    seconds_per_row,
    te_attention,
)  # fmt: skip
from tools.bench_gpu_report import Report
from tools.bench_gpu_sizes import FULL, SMOKE, STEADY, Sizes, chosen

_OFFICIAL = "flex, official 2L mask"
OBJECTIVES = {
    "AR": ["objective.name=ar"],
    "Eso-LM alpha_0 = 1": ["objective.alpha_0=1"],
    "Eso-LM alpha_0 = 0.25": ["objective.alpha_0=0.25"],
    "MDLM": ["objective.name=mdlm"],
}


def main() -> None:
    """Run the requested sections; exit with code 1 if one of their results failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--section", action="append", choices=SECTIONS, help="measure this; repeatable [all]"
    )
    parser.add_argument("--shape", action="append", help="shape of whole steps; repeatable [all]")
    parser.add_argument("--length", action="append", type=int, help="row length; repeatable [all]")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to see that all runs")
    parser.add_argument("--repeats", type=int, help="timings of each call; the best counts [3]")
    parser.add_argument(
        "--out", type=Path, help="JSON file for the results; it keeps those of earlier calls"
    )
    arguments = parser.parse_args()
    if HAS_TE:
        _restart_for_fp8_attention()
    if not ON_GPU and not arguments.smoke:
        raise SystemExit("no GPU here; --smoke shows that the benchmark runs")
    try:
        sizes = chosen(SMOKE if arguments.smoke else FULL, arguments.shape, arguments.length)
        sizes = replace(sizes, repeats=arguments.repeats or sizes.repeats)
        report = Report(arguments.out, _machine())
    except ConfigError as error:
        raise SystemExit(str(error)) from None
    look_at_new_objects()  # so that what sessions leave behind is collected between measurements
    for section in arguments.section or SECTIONS:
        begin = time.perf_counter()
        report.section(section)
        with report.trying(section):
            SECTIONS[section](sizes, report)
        print(f"({time.perf_counter() - begin:.0f} s)", flush=True)
    finish()  # NCCL complains about groups that are left
    raise SystemExit(report.failures > 0)


def _machine() -> dict[str, Any]:
    """Return what the results depend on besides this code."""
    return {
        "device": torch.cuda.get_device_name() if ON_GPU else "CPU",
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "transformer_engine": version("transformer-engine") if HAS_TE else None,
        "megatron_core": version("megatron-core"),
    }


def products(sizes: Sizes, report: Report) -> None:
    """Speed of one large matrix product, the reference for the shares of the peak."""
    size = 8192 if ON_GPU else 512
    speed = matmul_flops_per_second(torch.bfloat16, DEVICE, size=size)
    report.row(f"{size} x {size} in bf16", tflops=speed / 1e12)


def correctness(sizes: Sizes, report: Report) -> None:
    """Errors of outputs and gradients against a dense mask in float64, relative to the largest value."""
    inputs = attention_inputs(rows=6, heads=4, length=sizes.checked_length, size=sizes.head_size)
    settings = {"num_pairs": 2, "scale": sizes.head_size**-0.5}
    exact = outputs_and_gradients(dense_attention, inputs, torch.float64, settings)
    formats = torch.bfloat16, torch.float32
    cases: list[tuple[str, Callable[..., Tensor], torch.dtype]] = [
        *(("split", split_attention, dtype) for dtype in formats),
        *(("dense", dense_attention, dtype) for dtype in formats),
        *(("flex", flex_rows_attention, dtype) for dtype in formats),
    ]
    with report.trying("te"):
        of_te = _ways_of_te(heads=4, size=sizes.head_size, length=sizes.checked_length)
        cases[2:2] = [(name, way, torch.bfloat16) for name, way in of_te.items()]
    for name, way, dtype in cases:
        label = f"{name}, {str(dtype).removeprefix('torch.')}"
        if name == "flex" and not ON_GPU:
            report.row(label, error="flex has no backward pass on a CPU")
            continue
        with report.trying(label):
            if "FP8" in name:  # the first passes set the scales
                outputs_and_gradients(way, inputs, dtype, settings)
            found = outputs_and_gradients(way, inputs, dtype, settings)
            errors = [relative_error(a, b) for a, b in zip(found, exact, strict=True)]
            report.row(
                label, **dict(zip(("out", "d_query", "d_key", "d_value"), errors, strict=True))
            )


def _ways_of_te(*, heads: int, size: int, length: int) -> dict[str, Callable[..., Tensor]]:
    """Return the ways of attention through Transformer Engine; empty where it is not installed."""
    if not HAS_TE:
        return {}
    return {
        "te": te_attention(heads, size, length, []),
        "te, FP8": te_attention(heads, size, length, FP8_ATTENTION),
    }


def losses(sizes: Sizes, report: Report) -> None:
    """Losses of the same steps in bf16 and fp32, on rows that can be learned."""
    settings = [
        *sizes.loss_shape, *batch_settings(16 * 64, 64), "objective.alpha_0=0.5", *STEADY,
    ]  # fmt: skip
    found = {}
    for dtype in ("bf16", "fp32"):
        session = make_session([*settings, f"precision.dtype={dtype}"])
        read = counting_rows(64, session.config.model.vocab_size - 1)
        found[dtype] = [train_step(session, read).loss for _ in range(sizes.loss_steps)]
    gaps = [abs(a - b) / b for a, b in zip(found["bf16"], found["fp32"], strict=True)]
    report.row(
        f"{sizes.loss_steps} steps, bf16 against fp32", first=found["fp32"][0],
        last_bf16=found["bf16"][-1], last_fp32=found["fp32"][-1], largest_gap=max(gaps),
        mean_gap=sum(gaps) / len(gaps), **{f"losses_{name}": values for name, values in found.items()},
    )  # fmt: skip


def attention(sizes: Sizes, report: Report) -> None:
    """The sequential pass's attention: split; our rows under flex; the official 2L mask under flex."""
    for length in sizes.lengths:
        inputs = attention_inputs(rows=2, heads=sizes.heads, length=length, size=sizes.head_size)
        inputs = [x.bfloat16() for x in inputs]
        scale = sizes.head_size**-0.5
        ways: dict[str, Callable[..., Tensor]] = {
            "split": partial(split_attention, num_pairs=1, scale=scale),
            "flex, X and Z rows": partial(flex_rows_attention, num_pairs=1, scale=scale),
            _OFFICIAL: official_attention(length, scale),
        }  # fmt: skip
        of_official = [as_official(x) for x in inputs]
        with report.trying("te"):
            of_te = _ways_of_te(heads=sizes.heads, size=sizes.head_size, length=length)
            ways |= {name: partial(way, num_pairs=1, scale=scale) for name, way in of_te.items()}
        found: dict[str, float] = {}
        for name, way in ways.items():
            with report.trying(f"L = {length}: {name}"):
                given = of_official if name == _OFFICIAL else inputs
                forward = device_seconds(lambda w=way, i=given[:3]: w(*i), sizes.repeats)
                if not ON_GPU and name != "split":
                    report.row(f"L = {length}: {name}", forward_ms=forward * 1e3)
                    continue
                both = device_seconds(lambda w=way, i=given: forward_backward(w, i), sizes.repeats)
                found[name] = both
                pairs = 2 * length * length / 2 * 4 * sizes.heads * sizes.head_size
                of_split = ratio(both, found.get("split"))
                report.row(f"L = {length}: {name}", forward_ms=forward * 1e3, both_ms=both * 1e3,
                           tflops=3.5 * pairs / both / 1e12, of_split=of_split)  # fmt: skip
        torch.compiler.reset()  # otherwise the next length would be compiled with a dynamic length
        print("aim: split at least 1.3 x as fast as flex")


def training(sizes: Sizes, report: Report) -> None:
    """Tokens/s, TFLOP/s and MFU of whole steps, the optimizer included."""
    for label, shape in sizes.shapes.items():
        settings = [*shape, f"precision.dtype={'bf16' if ON_GPU else 'fp32'}"]
        longest = batch_settings(sizes.step_tokens, max(sizes.lengths))
        session = make_session([*settings, *longest])
        for length in sizes.lengths:
            _training_of_length(sizes, report, session, f"{label}, L = {length}", length, settings)
        del session
        free_memory()
    print("aims: MFU >= 45 % at 7B-shaped layers; Eso-LM alpha_0 = 1 >= 0.98 x AR")


def _training_of_length(
    sizes: Sizes, report: Report, session: Session, label: str, length: int, model: list[str]
) -> None:
    base: float | None = None
    for name, objective in OBJECTIVES.items():
        settings = [*objective, *batch_settings(sizes.step_tokens, length)]
        change_batch(session, settings)
        read = random_rows(length, session.config.model.vocab_size - 1)
        reset_peak_memory()
        with report.trying(f"{label}: {name}"):
            seconds = best_seconds(lambda r=read: train_step(session, r), sizes.repeats)
            config = session.config
            rows = config.train.global_batch_rows
            flops = model_flops_per_step(
                config.model, config.objective, sequence_length=length, rows=rows
            )
            speed = rows * length / seconds
            base = speed if name == "AR" else base
            report.row(f"{label}: {name}", tokens_per_second=speed, of_ar=ratio(speed, base),
                       tflops=flops.training / seconds / 1e12, mfu=_mfu(flops.training / seconds),
                       memory_gib=session.device.memory_gib(), settings=[*model, *settings])  # fmt: skip


def head(sizes: Sizes, report: Report) -> None:
    """The output head, forward and backward: on masked entries (half), on all, with all logits at once."""
    entries, hidden_size = sizes.step_tokens // 4, sizes.heads * sizes.head_size
    session = make_session(
        [*SMOKE.loss_shape, *batch_settings(SMOKE.step_tokens, 64)], for_training=False
    )  # only its groups are used
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    hidden = torch.randn(entries, hidden_size, device=DEVICE, dtype=dtype, requires_grad=True)
    weight = (
        torch.randn(sizes.vocab, hidden_size, device=DEVICE, dtype=dtype)
        .mul_(0.02)
        .requires_grad_()
    )
    targets = torch.randint(0, sizes.vocab - 1, (entries,), device=DEVICE)

    def ours(number: int) -> None:
        layer = Head(weight, None, sizes.vocab - 1, session.layout.tensor_group)
        known = torch.full((number,), -1.0 / number, device=DEVICE)
        found = target_log_probs(hidden[:number], targets[:number], layer, loss_gradient=known)
        (found * known).sum().backward()

    def all_logits() -> None:
        torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), targets).backward()

    half = best_seconds(lambda: ours(entries // 2), sizes.repeats)
    ways = {"half of the entries": half, "all entries": best_seconds(lambda: ours(entries), sizes.repeats),
            "all logits at once": best_seconds(all_logits, sizes.repeats)}  # fmt: skip
    for name, seconds in ways.items():
        report.row(
            f"{entries} entries, V = {sizes.vocab}: {name}",
            ms=seconds * 1e3,
            of_half=seconds / half,
        )


def sampling(sizes: Sizes, report: Report) -> None:
    """Seconds of one row at one token per step, from steps timed at three places in the row."""
    longest = max(*sizes.sampling_lengths, sizes.lengths[0])
    session = make_session(
        [
            *sizes.sampling_shape,
            *batch_settings(sizes.step_tokens, sizes.lengths[0]),
            f"model.max_length={longest + 1}",
            "precision.backend=torch",  # as in the command `sample`
        ],
        for_training=False,
    )
    for length in sizes.sampling_lengths:
        for cuda_graphs in (True, False):
            base: float | None = None
            launched = "CUDA graphs" if cuda_graphs else "kernel by kernel"
            for name in ("eso", "ar", "mdlm"):
                label = f"L = {length}: {name}, one token per step, {launched}"
                with report.trying(label):
                    seconds = seconds_per_row(
                        session, name, length, num_steps=(4 if name == "mdlm" else 20) * sizes.repeats,
                        cuda_graphs=cuda_graphs,
                    )  # fmt: skip
                    base = seconds if name == "eso" else base
                    report.row(label, seconds=seconds, of_eso=ratio(seconds, base))
    length = min(sizes.sampling_lengths)
    for cuda_graphs in (True, False):
        label = f"L = {length}: eso, a whole row, {'graphs' if cuda_graphs else 'kernel by kernel'}"
        with report.trying(label):
            seconds = seconds_per_row(session, "eso", length, num_steps=0, cuda_graphs=cuda_graphs)
            report.row(label, seconds=seconds)


def graphs(sizes: Sizes, report: Report) -> None:
    """Whole steps with layers launched as CUDA graphs against layers that launch single kernels."""
    for label, (shape, length) in sizes.graph_cases.items():
        base, losses = 0.0, []
        for is_graphed in (False, True):
            session = make_session(
                [
                    *shape,
                    *batch_settings(sizes.step_tokens, length),
                    "objective.alpha_0=0.25",
                    f"precision.dtype={'bf16' if ON_GPU else 'fp32'}",
                    f"parallel.cuda_graphs={is_graphed}".lower(),
                ]
            )
            read = counting_rows(length, session.config.model.vocab_size - 1)
            losses.append([train_step(session, read).loss for _ in range(3)])
            seconds = best_seconds(lambda s=session, r=read: train_step(s, r), sizes.repeats)
            base = base or seconds
            report.row(
                f"{label}, L = {length}: {'graphs' if is_graphed else 'no graphs'}",
                tokens_per_second=sizes.step_tokens / seconds, of_plain=base / seconds,
                memory_gib=session.device.memory_gib(),
                loss_gap=max(abs(a - b) for a, b in zip(losses[0], losses[-1], strict=True)),
            )  # fmt: skip
            del session
            free_memory()


SECTIONS: dict[str, Callable[[Sizes, Report], None]] = {
    "products": products,
    "correctness": correctness,
    "losses": losses,
    "attention": attention,
    "training": training,
    "graphs": graphs,
    "head": head,
    "sampling": sampling,
    "fp8": fp8,
    "fp8_losses": fp8_losses,
}


def _restart_for_fp8_attention() -> None:
    """Restart this process with the recipe that Transformer Engine reads once, when it is imported."""
    wanted = process_environment(load_config(None, ["train.steps=1", *FP8_ATTENTION]))[DPA_RECIPE]
    if os.environ.get(DPA_RECIPE) != wanted:
        command = [sys.executable, "-m", "tools.bench_gpu", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | {DPA_RECIPE: wanted})


def _mfu(flops_per_second: float) -> float | None:
    peak = peak_of(torch.cuda.get_device_name()) if ON_GPU else None
    return None if peak is None else flops_per_second / peak.bf16


if __name__ == "__main__":
    main()
