"""The parts of bench_gpu.py: sessions, inputs, clocks, and other ways of attention than ours."""

import gc
import os
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from megatron_eso.config import derive, load_config
from megatron_eso.config.precision_rules import process_environment
from megatron_eso.launch.environment import Ranks
from megatron_eso.model.attention.rows import AttentionRows
from megatron_eso.parallel.exchange import Rows
from megatron_eso.parallel.megatron_patches import importing_megatron
from megatron_eso.sample.generate import plan_for
from megatron_eso.sample.plan import DecodingPlan
from megatron_eso.sample.prompt import rows_with_prompts
from megatron_eso.sample.sampler import Choice, fill_rows
from megatron_eso.sample.settings import PlanSettings
from megatron_eso.train.session import Session, build_session

with importing_megatron():
    from megatron.core.fp8_utils import get_fp8_context

ON_GPU = torch.cuda.is_available()
HAS_TE = ON_GPU and find_spec("transformer_engine") is not None
FP8 = ["precision.backend=te", "precision.fp8=tensorwise"]
FP8_ATTENTION = [*FP8, "precision.fp8_attention=true"]
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
_GOLDEN = (5**0.5 - 1) / 2  # its multiples modulo 1 are evenly spread
_PLACES = (1 / 6, 1 / 2, 5 / 6)
_PRODUCTS_BEFORE = 30  # of 1.4 ms each
_STEPS_BEFORE = 3  # before the timed steps; see seconds_per_row


def make_session(settings: list[str], *, for_training: bool = True) -> Session:
    """Return a session on this single process."""
    config = load_config(None, ["train.steps=1000000", *settings])
    os.environ.update(process_environment(config))
    session = build_session(config, Ranks(0, 1, 0), for_training=for_training, draw_weights=False)
    session.draw_weights(draw_on=DEVICE)
    reset_peak_memory()
    return session


def change_batch(session: Session, settings: list[str]) -> None:
    """Give a session another objective and batch, but keep its model."""
    new = load_config(None, ["train.steps=1000000", *settings])
    session.config = replace(session.config, objective=new.objective, train=new.train)
    session.derived = derive.derive(session.config, 1)


def batch_settings(step_tokens: int, length: int) -> list[str]:
    """Return settings of a step of ``step_tokens`` data tokens, with micro-batches of at least two rows."""
    rows = max(step_tokens // length, 4)
    at_once = max(step_tokens // 4 // length, 2)
    return [f"model.max_length={length}", f"train.sequence_length={length}",
            f"train.global_batch_rows={rows}", f"train.micro_batch_rows={at_once}"]  # fmt: skip


def random_rows(length: int, num_tokens: int) -> Callable[[int, list[int]], Rows]:
    """Return a reader of random rows."""

    def read(step: int, rows: list[int]) -> Rows:
        tokens = torch.randint(0, num_tokens, (len(rows), length + 1))
        return Rows(tokens, torch.ones_like(tokens, dtype=torch.bool))

    return read


def counting_rows(length: int, num_tokens: int) -> Callable[[int, list[int]], Rows]:
    """Return a reader of rows that count up from a start given by step and row, so they can be learned.

    The starts of every step are spread over all tokens. When they moved from step to step, losses jumped,
    and two runs diverged whatever their number formats (docs/LOG.md).
    """

    def read(step: int, rows: list[int]) -> Rows:
        numbers = torch.tensor([1024 * step + row for row in rows], dtype=torch.float64)
        start = (numbers * _GOLDEN % 1 * num_tokens).long()[:, None]
        tokens = (start + torch.arange(length + 1)) % num_tokens
        return Rows(tokens, torch.ones_like(tokens, dtype=torch.bool))

    return read


def attention_inputs(*, rows: int, heads: int, length: int, size: int) -> list[Tensor]:
    """Return queries, keys, values and the output's gradient in float32, laid out as layers produce them.

    Each is [R, h, L, d]; in memory, tokens come first, as in Megatron's activations.
    """
    generator = torch.Generator(DEVICE).manual_seed(1)
    shape = (length, rows, heads, size)
    return [
        torch.randn(shape, generator=generator, device=DEVICE).permute(1, 2, 0, 3) for _ in range(4)
    ]


def forward_backward(way: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Return output and gradients, given queries, keys, values and the output's gradient."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out = way(*leaves)
    out.backward(inputs[3])
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


def outputs_and_gradients(
    way: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype, settings: dict
) -> list[Tensor]:
    """Return the result of :func:`forward_backward`, computed in a number format."""
    return forward_backward(lambda *x: way(*x, **settings), [x.to(dtype) for x in inputs])


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    return float((found.double() - exact).abs().max() / exact.abs().max())


def official_attention(length: int, scale: float) -> Callable[..., Tensor]:
    """Return the official scheme's attention of [z; x] (:func:`as_official`) under one block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def may_look(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_z, key_is_x = query < length, key >= length
        of_z = (query == key) | (key_is_x & (query > key - length))
        return torch.where(is_z, of_z, key_is_x & (query >= key))

    mask = create_block_mask(may_look, None, None, 2 * length, 2 * length, device=str(DEVICE))
    function = torch.compile(flex_attention, dynamic=False) if ON_GPU else flex_attention

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Any = function(query, key, value, block_mask=mask, scale=scale)
        return out

    return attend


def as_official(rows: Tensor) -> Tensor:
    """Return [z; x], [1, h, 2L, d], of our rows [X; Z], [2, h, L, d]."""
    return torch.cat([rows[1:], rows[:1]], dim=2)


def te_attention(heads: int, size: int, length: int, settings: list[str]) -> Callable[..., Tensor]:
    """Return the attention of Transformer Engine layers: D and X rows by its kernel, Z rows by our merge.

    Args:
        heads: attention heads.
        size: head size.
        length: tokens of a row.
        settings: further settings, such as FP8_ATTENTION.
    """
    session = make_session(
        [f"model.hidden_size={heads * size}", f"model.num_heads={heads}", "model.num_layers=1",
         "model.vocab_size=64", *batch_settings(4 * length, length), "precision.dtype=bf16",
         "precision.attention=te", *settings],
        for_training=False,
    )  # fmt: skip
    core: Any = session.chunks[0].get_submodule("decoder.layers.0.self_attention.core_attention")

    def attend(*rows: Tensor, num_pairs: int, scale: float) -> Tensor:
        query, key, value = (x.permute(2, 0, 1, 3) for x in rows)
        with get_fp8_context(core.config, 0):
            out = core.attend_rotated(query, key, value, AttentionRows(num_pairs=num_pairs))
        return out.unflatten(2, (heads, size)).permute(1, 2, 0, 3)

    return attend


def best_seconds(run: Callable[[], object], repeats: int) -> float:
    """Return the best time of a call in seconds, after one that compiles and warms up."""
    run()
    times = []
    for _ in range(repeats):
        synchronize()
        begin = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - begin)
    return min(times)


def device_seconds(run: Callable[[], object], repeats: int) -> float:
    """Return the best time of a call on the GPU in seconds, without the CPU's time to launch it.

    Matrix products first keep the GPU busy for longer than the launch takes, so the CPU gets ahead, as it
    does in a model. Without a GPU, this is :func:`best_seconds`.
    """
    if not ON_GPU:
        return best_seconds(run, repeats)
    run()
    matrix = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    times = []
    for _ in range(repeats):
        synchronize()
        for _ in range(_PRODUCTS_BEFORE):
            matrix @ matrix
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return min(times)


def ratio(one: float | None, other: float | None) -> float | None:
    """Return ``one / other``; None if one of them could not be measured."""
    return None if one is None or other is None else one / other


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if ON_GPU:
        torch.cuda.synchronize()


def reset_peak_memory() -> None:
    """Reset the peak of the GPU's memory to what is in use now."""
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()


def free_memory() -> None:
    """Return unused memory to the GPU, after a garbage collection: models hold reference cycles."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def seconds_per_row(
    session: Session, objective: str, length: int, *, num_steps: int, cuda_graphs: bool
) -> float:
    """Return the seconds of one row at one token per step.

    Args:
        session: a model, trained for any objective.
        objective: eso, ar or mdlm.
        length: tokens of the row.
        num_steps: steps timed at each of three places, after three untimed ones: the first fills the
            cache, the second runs without a graph, the third is captured. 0: time the whole row.
        cuda_graphs: steps may run from graphs.
    """
    replica = session.replica
    changed = replace(replica.config.objective, name=objective)
    replica = replace(replica, config=replace(replica.config, objective=changed))
    canvas = rows_with_prompts([[]], length, replica.config.model)
    settings = PlanSettings()
    if objective != "ar":
        alpha_0 = 1.0 if objective == "eso" else None
        settings = PlanSettings(alpha_0=alpha_0, method="fixed", num_steps=length)
    choice = Choice(seed=1, cuda_graphs=cuda_graphs)
    plan = plan_for(changed, canvas, settings, choice)
    rows = torch.zeros_like(plan.order)
    if not num_steps:
        return best_seconds(lambda: fill_rows(replica, rows, plan, choice), 1)
    per_step = []
    for place in _PLACES:
        begin = round(place * (length - num_steps - _STEPS_BEFORE))
        counts = plan.counts[begin : begin + _STEPS_BEFORE + num_steps]
        part = DecodingPlan(plan.order, begin, counts)
        begins: list[float] = []

        def note(step: int, tokens: torch.Tensor, begins: list[float] = begins) -> None:
            if step == _STEPS_BEFORE - 1:
                synchronize()
                begins.append(time.perf_counter())

        fill_rows(replica, rows, part, replace(choice, on_step=note))
        synchronize()
        per_step.append((time.perf_counter() - begins[0]) / (len(counts) - _STEPS_BEFORE))
    return length * sum(per_step) / len(per_step)
