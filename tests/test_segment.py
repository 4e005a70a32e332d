"""The sampler's lean pass against Megatron's block on the same weights."""

import pytest
import torch
from torch.nn.functional import linear

from megatron_eso.model.segment import SegmentPass, can_run, few_linear
from megatron_eso.objective.rows import Pattern
from megatron_eso.sample.cache import Cache
from tests.rank_jobs import LENGTH, VOCAB, _replica_session

SHAPES = {
    "grouped, gated": [],
    "query and key norms": ["model.qk_norm=true", "model.num_kv_heads=4"],
    "official": [
        "model.norm=layernorm", "model.activation=gelu", "model.mlp_bias=true", "model.num_kv_heads=4",
    ],
    "biased, tied": ["model.attention_bias=true", "model.mlp_bias=true", "model.tie_embeddings=true"],
    "head bias": ["model.head_bias=true"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["one", "tensor"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
def test_it_computes_what_megatron_s_block_computes(one_rank, two_ranks, shape, dtype, ranks):
    pool, layout = (one_rank, []) if ranks == "one" else (two_ranks, ["parallel.tensor=2"])
    for reply in pool.run("test_segment.largest_differences", [*SHAPES[shape], *layout], dtype):
        assert reply["size"] > 0.1
        assert max(reply["differences"]) <= {"fp64": 1e-12, "fp32": 1e-5}[dtype]


@pytest.mark.slow
def test_layers_it_does_not_know_are_left_to_megatron(one_rank):
    assert one_rank.run("test_segment.knows", False)[0]
    assert not one_rank.run("test_segment.knows", True)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("number", [1, 2, 3, 64, 65])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product_with_few_entries_is_the_product(number, dtype, has_bias):
    generator = torch.Generator().manual_seed(number)
    x, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((number, 24), (40, 24), 40)
    )
    found = few_linear(x, weight, bias if has_bias else None)
    assert found.shape == (number, 40)
    assert found.is_contiguous()
    torch.testing.assert_close(found, linear(x, weight, bias if has_bias else None))


def largest_differences(overrides, dtype):
    """Return how much the two passes' logits differ in a few steps, and how large the logits are."""
    session = _replica_session([*overrides, "parallel.sequence=false"], dtype)
    model = session.chunks[0].eval()
    generator = torch.Generator().manual_seed(1)
    for (
        parameter
    ) in model.parameters():  # norms start at one and biases at zero, which hides errors
        if parameter.dim() == 1:
            parameter.data += torch.randn(parameter.shape, generator=generator).to(parameter) * 0.3
    lean, caches = SegmentPass(model), (Cache(LENGTH), Cache(LENGTH))
    differences, size = [], 0.0
    padding = torch.tensor([[0], [2]])
    with torch.no_grad():
        for first, number, pattern in [
            (0, 5, Pattern.CAUSAL), (5, 1, Pattern.CAUSAL), (6, 2, Pattern.CAUSAL), (8, 4, Pattern.BLOCK),
        ]:  # fmt: skip
            tokens = torch.randint(0, VOCAB, (2, number), generator=generator)
            columns = torch.arange(first, first + number).expand(2, -1)
            seen = torch.arange(first + number) >= padding
            logits = []
            for cache, run in zip(caches, (lean, model), strict=True):
                rows = model.attention_rows(
                    (columns - padding).clamp(min=0), store=cache, pattern=pattern, is_valid=seen
                )
                hidden = run.hidden_states(tokens, rows)
                logits.append(run.logits(hidden, torch.arange(2 * number)))
                cache.keep(number)
            differences.append(float((logits[0] - logits[1]).abs().max()))
            size = max(size, float(logits[1].std()))
        rows = model.attention_rows(columns, pattern=Pattern.BIDIRECTIONAL)
        whole = [run.hidden_states(tokens, rows) for run in (lean, model)]
        differences.append(float((whole[0] - whole[1]).abs().max()))
    return {"differences": differences, "size": size}


def knows(with_other_layer):
    """Return whether the lean pass accepts a stage, with one layer's norm exchanged or not."""
    model = _replica_session([], "fp32").chunks[0]
    if with_other_layer:
        model.decoder.layers[1].input_layernorm = torch.nn.Identity()
    return can_run(model)
