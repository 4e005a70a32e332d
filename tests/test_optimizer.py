"""The optimizer Megatron builds updates as AdamW's formula says, in one pass over each parameter."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from megatron_eso.config.schema import OptimizerConfig
from megatron_eso.parallel.norms import RMSNorm
from megatron_eso.parallel.parameters import dealt
from megatron_eso.train.learning_rate import learning_rate


def test_three_updates_follow_the_formula(one_rank):
    found = one_rank.run("updates", [], 3)[0]
    for ours, expected in zip(found["weights"], found["expected"], strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6)


def test_torch_updates_a_parameter_in_one_pass(one_rank):
    found = one_rank.run("updates", [], 1)[0]
    assert found["kinds"] == ["AdamW"]
    assert all(found["is_fused"])


@pytest.mark.parametrize(
    ("schedule", "decay_steps", "expected"),
    [
        ("constant", None, {4: 1.0, 8: 1.0, 12: 1.0, 20: 1.0}),
        ("cosine", None, {4: 1.0, 6: 0.6 + 0.4 * 0.5**0.5, 8: 0.6, 12: 0.2, 20: 0.2}),
        ("cosine", 4, {4: 1.0, 6: 0.6, 8: 0.2, 9: 0.2, 12: 0.2}),
        ("wsd", 4, {4: 1.0, 8: 1.0, 9: 0.8, 10: 0.6, 12: 0.2, 20: 0.2}),
    ],
)
def test_the_learning_rate_rises_from_0_and_decays_to_its_minimum(schedule, decay_steps, expected):
    """Four steps of warm-up, twelve in all."""
    optimizer = OptimizerConfig(
        learning_rate=1.0, min_learning_rate=0.2, warmup_steps=4, schedule=schedule,
        decay_steps=decay_steps,
    )  # fmt: skip
    expected = {0: 0.25, 1: 0.5, 3: 1.0, **expected}
    found = {step: learning_rate(step, optimizer, 12) for step in expected}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6])
def test_gradients_are_clipped_to_the_norm_asked_for(one_rank, max_norm):
    found = one_rank.run("clipped", [f"optimizer.clip_grad_norm={max_norm}"])[0]
    limit = min(max_norm or float("inf"), found["before"])
    assert found["before"] > 0.5
    assert found["after"] == pytest.approx(limit, rel=1e-5)


def test_the_norm_on_a_cpu_is_torchs_with_its_gradients():
    config = SimpleNamespace(params_dtype=torch.float64, sequence_parallel=False)
    ours, theirs = RMSNorm(config, 24, eps=1e-5), torch.nn.RMSNorm(24, eps=1e-5).double()
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 7, 3, 24, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        ours.weight.copy_(torch.rand(24, generator=generator))
        theirs.weight.copy_(ours.weight)
    results = []
    for norm in (ours, theirs):
        inputs = x.clone().requires_grad_()
        out = norm(inputs)
        out.backward(grad)
        results.append((out.detach(), inputs.grad, norm.weight.grad))
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 6, 8])
def test_parameters_are_dealt_evenly_by_size(num_ranks):
    """This also holds where the period of a layer's parameters equals the number of ranks."""
    layer = [64, 64 * 96, 64 * 64, 64, 64 * 344, 64 * 172]
    parameters = [
        nn.Parameter(torch.empty(size, device="meta")) for size in [64 * 500, *layer * 12]
    ]
    ranks = dealt(parameters, num_ranks)
    assert ranks == dealt(parameters, num_ranks)
    loads = [0] * num_ranks
    for parameter, rank in zip(parameters, ranks, strict=True):
        loads[rank] += parameter.numel()
    assert max(loads) <= 1.1 * sum(loads) / num_ranks
