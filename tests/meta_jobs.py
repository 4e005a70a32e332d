"""Jobs of a rank on the GPU that computes nothing (tests/meta_gpu.py); see rank_jobs.py."""

from typing import Any

import torch

from megatron_eso.eval import evaluate as evaluate_module
from megatron_eso.launch.environment import Ranks
from megatron_eso.parallel.optimizer import apply_gradients
from megatron_eso.sample.generate import plan_for
from megatron_eso.sample.prompt import rows_with_prompts
from megatron_eso.sample.sampler import Choice, fill_rows
from megatron_eso.sample.settings import PlanSettings
from megatron_eso.train.session import build_session
from tests import rank_jobs
from tests.meta_gpu import GPU, instead_of_a_gpu

_BF16 = ("precision.dtype=bf16", "model.head_size=64")


def step_and_evaluation(overrides: list[str], num_ranks: int, cudnn: int) -> dict[str, Any]:
    """Run a step's passes, its update, and an evaluation up to the point where its result is read.

    Returns:
        Operators of the passes, and the devices of weights, gradients and optimizer state.
    """
    with instead_of_a_gpu(num_ranks=num_ranks, cudnn=cudnn) as watch:
        config = rank_jobs.small_config(overrides)
        session = build_session(config, Ranks(0, num_ranks, 0), draw_weights=False)
        before = watch.num_operators
        rank_jobs.passes_of_step(session, 0)
        num_operators = watch.num_operators - before
        session.optimizer.prepare_grads()
        for inner in session.optimizer.chained_optimizers:
            for group in inner.optimizer.param_groups:
                group["fused"], group["foreach"] = False, True  # the fused one refuses meta tensors
        apply_gradients(session.optimizer, learning_rate=1e-3, max_norm=0.5, norm=1.0)
        assert session.average is not None
        session.average.update(1)
        ended = ""
        try:
            evaluate_module.evaluate(
                session.replica, lambda rows: rank_jobs.read_rows(7, rows), num_rows=6,
                bytes_per_token=4.0,
            )  # fmt: skip
        except NotImplementedError as error:
            ended = str(error)
        parameters = [p for chunk in session.chunks for p in chunk.parameters()]
        tensors = [*parameters, *(p.main_grad for p in parameters), *session.average.parts.values()]  # type: ignore[attr-defined]
        return {
            "num_operators": num_operators,
            "devices": sorted({x.device.type for x in tensors}),
            "evaluation_ended": ended,
        }


def complaint(name: str) -> str:
    """Return what the watch says about a mistake."""
    with instead_of_a_gpu(num_ranks=1, cudnn=0):
        x, on_host = torch.ones(3, device=GPU), torch.ones(3)
        mistakes = {
            "mixed": lambda: x + on_host,
            "index": lambda: x[torch.tensor([0, 1])],
            "item": lambda: x.sum().item(),
            "mask": lambda: x[x > 0],
        }
        try:
            mistakes[name]()
        except RuntimeError as error:
            return str(error)
    return ""


def sample(objective: str, padded: bool) -> int:
    """Fill rows with the decoder of an objective; return the operators that ran on the GPU."""
    with instead_of_a_gpu(num_ranks=1, cudnn=91900) as watch:
        overrides = [f"objective.name={objective}", "objective.block_size=4", *_BF16]
        config = rank_jobs.small_config(overrides)
        session = build_session(config, Ranks(0, 1, 0), for_training=False, draw_weights=False)
        prompts = [[3, 4], [5] if padded else [5, 6]]
        canvas = rows_with_prompts(prompts, 16, config.model)
        settings = PlanSettings()
        if objective in ("eso", "mdlm"):
            alpha_0 = 0.5 if objective == "eso" else None
            settings = PlanSettings(alpha_0=alpha_0, method="fixed", num_steps=8)
        plan = plan_for(config.objective, canvas, settings, Choice(seed=1))
        before = watch.num_operators
        fill_rows(
            session.replica, canvas.tokens, plan, Choice(seed=1, top_p=0.9), padding=canvas.padding
        )
        return watch.num_operators - before
