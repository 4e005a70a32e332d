"""Layers that run from CUDA graphs give the same numbers as without graphs, bit by bit.

Tested over a stand-in for CUDA graphs that runs on a CPU (tests/cpu_graphs.py). Not tested: that a GPU
captures these kernels, and how much this gains.
"""

from importlib.metadata import version

import numpy as np
import pytest
import torch

from megatron_eso.config import load_config
from megatron_eso.config.check import check
from megatron_eso.errors import ConfigError
from megatron_eso.parallel.device import prepare_for_graphs
from tests import cpu_graphs
from tests.graph_jobs import GRAPHS
from tests.rank_jobs import SMALL
from tests.test_layouts import TWO

BF16 = ["precision.dtype=bf16"]


def assert_bitwise(graphed, plain):
    for mine, theirs in zip(graphed, plain, strict=True):
        assert mine["losses"] == theirs["losses"]
        assert mine["scores"] == theirs["scores"]
        assert len(mine["weights"]) == len(theirs["weights"]) > 0
        for one, other in zip(mine["weights"], theirs["weights"], strict=True):
            assert one[:3] == other[:3]
            np.testing.assert_array_equal(one[3], other[3], err_msg=one[0])
        assert theirs["replays"] == 0
        assert theirs["sets"] == [[] for _ in mine["sets"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "kinds", "micro_batches"),
    [
        # Copies of sequential rows in a micro-batch: the deal gives it one pair or two.
        pytest.param(["objective.alpha_0=0.5"], [1, 2], 6, id="hybrid"),
        pytest.param(["objective.alpha_0=0.5", *BF16], [1, 2], 6, id="hybrid-bf16"),
        pytest.param(["objective.alpha_0=1"], [0], 4, id="diffusion"),
        pytest.param(["objective.name=ar", "model.norm=layernorm"], [0], 4, id="ar"),
    ],
)
def test_one_rank_trains_the_same_weights(one_rank, settings, kinds, micro_batches):
    plain = one_rank.run("graph_jobs.train", settings)
    graphed = one_rank.run("graph_jobs.train", [*settings, GRAPHS])
    assert_bitwise(graphed, plain)
    assert graphed[0]["sets"] == [[(kind, 0) for kind in kinds]]
    # Two graphs per layer in each micro-batch of three steps; none in the evaluation.
    assert graphed[0]["replays"] == 2 * 4 * micro_batches * 3


@pytest.mark.slow
@pytest.mark.parametrize("layout", TWO)
def test_two_ranks_train_the_same_weights(two_ranks, layout):
    """With overlap: weights are gathered, and gradients summed, while other layers run."""
    settings = [*TWO[layout], "parallel.overlap=true", "objective.alpha_0=0.5"]
    plain = two_ranks.run("graph_jobs.train", settings)
    graphed = two_ranks.run("graph_jobs.train", [*settings, GRAPHS])
    assert_bitwise(graphed, plain)
    assert all(reply["replays"] > 0 for reply in graphed)
    in_flight = [{place for _, place in chunk} for reply in graphed for chunk in reply["sets"]]
    if layout == "tensor":  # whole rows are gathered into a buffer that evaluations may replace
        assert all(set(reply["kept_buffers"]) == {1} for reply in graphed)
    if layout == "pipeline":  # the first stage runs one pass ahead of its gradients
        assert in_flight == [{0, 1}, {0}]
    elif layout != "interleaved":
        assert in_flight == [{0}, {0}]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [[], ["parallel.tensor=2"]], ids=["data", "tensor"])
def test_layers_of_transformer_engine_train_the_same_weights(te_ranks, layout):
    """Transformer Engine's products add weight gradients to their buffers inside the graph."""
    te = ["precision.backend=te", "precision.attention=te"]
    settings = [*layout, *BF16, *te, "objective.alpha_0=0.5"]
    plain = te_ranks.run("graph_jobs.train_te", settings)
    graphed = te_ranks.run("graph_jobs.train_te", [*settings, GRAPHS])
    assert_bitwise(graphed, plain)
    assert all(reply["replays"] > 0 for reply in graphed)


@pytest.mark.slow
def test_a_run_says_what_became_of_the_settings(two_ranks, te_ranks):
    settings = ["parallel.tensor=2", GRAPHS, "parallel.tensor_overlap=true"]
    asked = [*settings, "precision.dtype=auto"]
    assert two_ranks.run("graph_jobs.said_on_a_cpu", asked)[0][1:] == [
        "parallel.tensor_overlap=true has no effect: plain layers have no user buffers",
        "parallel.cuda_graphs=true has no effect: there is no GPU",
    ]
    said = te_ranks.run("graph_jobs.said_on_a_gpu", [*settings, *BF16, "precision.backend=te"])
    assert said[0] == [
        "precision.dtype = bf16, attention split, cpu flash kernel, device cpu",
        "layers of Transformer Engine 2.11.0, fp8 off, user buffers",
        "layers run from CUDA graphs, captured in the first step",
    ]


@pytest.mark.slow
def test_a_set_is_free_when_nobody_can_ask_for_its_backward_pass(one_rank):
    found = one_rank.run("graph_jobs.uses", [])[0]
    assert (found["dropped"], found["held"]) == (1, 2)
    assert "can be differentiated once" in found["raised"]
    assert found["left"] == 0  # NCCL waits for graphs that refer to its communicators


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("alpha_0", [1, 0.5])
def test_a_gpu_trains_the_same_from_real_graphs(one_rank, alpha_0):
    settings = [f"objective.alpha_0={alpha_0}", "model.head_size=64", *BF16]
    plain = one_rank.run("graph_jobs.losses", settings)[0]
    graphed = one_rank.run("graph_jobs.losses", [*settings, GRAPHS])[0]
    np.testing.assert_allclose(graphed, plain, rtol=2e-3)


@pytest.mark.slow
@pytest.mark.skipif(
    version("megatron-core") >= "0.17",
    reason="NOT TESTED: other code, which the stand-in does not fit",
)
def test_megatrons_own_graphs_give_wrong_gradients(one_rank):
    """The reason for our own graphs. If this fails, Megatron's may suffice: see model/layer_graphs.py."""
    plain = one_rank.run("graph_jobs.gradients_with_megatrons_graphs", False)[0]
    graphed = one_rank.run("graph_jobs.gradients_with_megatrons_graphs", True)[0]
    assert graphed.keys() == plain.keys()
    wrong = {
        name.removeprefix("module.")
        for name, gradient in plain.items()
        if not np.allclose(graphed[name], gradient, rtol=1e-5, atol=1e-6 * np.abs(gradient).max())
    }
    assert wrong == {
        "embedding.word_embeddings.weight", "decoder.layers.0.input_layernorm.weight",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["model.dropout=0.1"], r"model\.dropout=0\.1 draws new numbers"),
        (["parallel.recompute=full"], r"parallel\.recompute=full repeats passes"),
        (["parallel.recompute=attention"], r"parallel\.recompute=attention repeats passes"),
        (
            ["precision.fp8=tensorwise", "precision.dtype=bf16"],
            r"precision\.fp8=tensorwise updates its scales",
        ),
        (["objective.name=mdlm"], r"objective\.name=mdlm has another mask"),
        (["objective.name=bd3lm"], r"objective\.name=bd3lm has another mask"),
    ],
)
def test_what_a_graph_cannot_hold_is_refused(settings, says):
    with pytest.raises(ConfigError, match=rf"parallel\.cuda_graphs=true: {says}"):
        check(load_config(None, [*SMALL, *settings, GRAPHS]))


@pytest.mark.parametrize(
    ("environment", "registers"),
    [
        ({}, None),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, "0"),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, "0"),
        ({"NCCL_GRAPH_REGISTER": "1"}, "1"),
    ],
)
def test_nccl_registers_no_buffers_in_expandable_segments(environment, registers):
    prepare_for_graphs(environment)
    assert environment.get("NCCL_GRAPH_REGISTER") == registers


def test_registration_in_expandable_segments_is_refused():
    environment = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "NCCL_GRAPH_REGISTER": "1"}
    with pytest.raises(ConfigError, match="unset one of the two"):
        prepare_for_graphs(environment)


def test_the_stand_in_replays_on_the_same_memory():
    x, total = torch.ones(3), torch.zeros(3)
    graph = cpu_graphs.CpuGraph()
    with cpu_graphs.instead_of_cuda_graphs(), torch.cuda.graph(graph, pool=1):  # type: ignore[arg-type]
        y = x * 2
        total.add_(y)
    assert torch.isnan(y).all() and not total.any()  # nothing has run
    for value in (1.0, 5.0):
        x.fill_(value)
        graph.replay()
        assert y.tolist() == [2 * value] * 3
    assert total.tolist() == [12.0] * 3


@pytest.mark.parametrize(
    "operation",
    [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x + torch.tensor([1.0, 2.0, 3.0])],
    ids=["item", "mask", "host-constant"],
)
def test_the_stand_in_refuses_what_needs_the_host(operation):
    x = torch.ones(3)
    with (
        cpu_graphs.instead_of_cuda_graphs(),
        pytest.raises(RuntimeError, match="cannot be captured"),
        torch.cuda.graph(cpu_graphs.CpuGraph(), pool=1),  # type: ignore[arg-type]
    ):
        operation(x)
