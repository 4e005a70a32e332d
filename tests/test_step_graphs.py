"""A sampler's steps that run from CUDA graphs give the same results as without graphs.

Tested over a stand-in for CUDA graphs that runs on a CPU (tests/cpu_graphs.py); the last test needs a GPU.
"""

import numpy as np
import pytest
import torch

from megatron_eso.model.attention import store
from megatron_eso.model.attention.kernels import masked_forward
from megatron_eso.model.attention.rows import AttentionRows
from megatron_eso.sample.graphs import window_of
from tests.test_attention import ON_GPU

LENGTH = 48
PLANS = {
    "eso": ({"alpha_0": 0.7, "num_steps": 12, "method": "binomial"}, 6),
    "eso, one by one": ({"alpha_0": 1.0, "num_steps": LENGTH - 3, "method": "fixed"}, 6),
    "ar": ({"alpha_0": 0.0, "num_steps": 1, "method": "left-to-right"}, 6),
    "mdlm": ({"alpha_0": 1.0, "num_steps": 12, "method": "binomial"}, 4),
    "bd3lm": ({"block_size": 8, "num_steps": 24, "method": "fixed"}, 6),
}
"""Settings of a plan, and the most graphs that it may need: windows times sizes of a step."""


def rows_of(name, num_given, settings, length=LENGTH):
    """Return a job's first arguments: overrides, format, given positions, rows, plan."""
    model = [f"train.sequence_length={length}", f"model.max_length={length + 1}", *settings]
    objective = [f"objective.name={name.partition(',')[0]}", "objective.block_size=8", *model]
    generator = np.random.default_rng(0)
    rows = generator.integers(0, 30, (2, length))
    given = np.tile(np.arange(length) < num_given, (2, 1))
    return objective, "fp64", given, rows, {**PLANS[name][0], "seed": 3}


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize(
    ("name", "padding"),
    # Block diffusion refuses padded rows.
    [*((name, (0, 0)) for name in PLANS), *((name, (0, 2)) for name in PLANS if name != "bd3lm")],
)
def test_steps_from_graphs_decide_the_same(one_rank, name, padding, kv_heads):
    arguments = rows_of(name, 0 if name == "bd3lm" else 3, [f"model.num_kv_heads={kv_heads}"])
    choice = {"seed": 5, "padding": np.array(padding)}
    plain = one_rank.run("sample_rows", *arguments, choice)[0]
    graphed = one_rank.run("graph_jobs.sample_rows", *arguments, choice)[0]
    assert np.array_equal(graphed["tokens"], plain["tokens"])
    np.testing.assert_allclose(graphed["log_probs"], plain["log_probs"], atol=1e-10, rtol=0)
    assert 1 <= graphed["captured"] <= PLANS[name][1]
    assert graphed["replayed"] >= plain["num_steps"] // 3
    assert graphed["left"] == 0  # they go with the batch, and the cache with them


@pytest.mark.slow
def test_a_choice_without_graphs_captures_none(one_rank):
    choice = {"seed": 5, "cuda_graphs": False}
    found = one_rank.run("graph_jobs.sample_rows", *rows_of("eso", 3, []), choice)[0]
    assert found["captured"] == found["replayed"] == 0


@pytest.mark.parametrize("total", [1, 2, 255, 256, 257, 1000, 1024, 2047, 5000, 8192])
def test_a_window_holds_what_is_seen_and_little_more(total):
    window = window_of(total, 10_000)
    assert total <= window <= total + max(256, total / 4)
    assert window_of(total, total) == total


@pytest.mark.parametrize("has_padding", [False, True])
@pytest.mark.parametrize(("num_rows", "heads", "groups"), [(1, 4, 4), (2, 6, 3)])
@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_chunks_of_keys_give_the_attention_of_all(
    monkeypatch, device, num_rows, heads, groups, has_padding
):
    if device == "cpu":
        monkeypatch.setattr(store, "chunk_of", lambda query, key: 256)
    dtype = torch.float64 if device == "cpu" else torch.float32
    new, kept, window = 4, 700, 2048
    generator = torch.Generator().manual_seed(0)

    def drawn(heads, number):
        drawn = torch.randn(num_rows, heads, number, 16, dtype=dtype, generator=generator)
        return drawn.to(device)

    query, (key, value) = drawn(heads, new), (drawn(groups, 2304)[:, :, :window] for _ in range(2))
    seen = torch.arange(window) <= kept + torch.arange(new)[:, None]
    if has_padding:
        first = torch.tensor([0, 300])[:num_rows, None, None, None]
        seen = seen & (torch.arange(window) >= first)
    seen = seen.to(device)
    mask = torch.zeros(seen.shape, dtype=dtype, device=device)
    mask.masked_fill_(~seen, store.lowest_score(dtype))
    assert store.chunk_of(query, key) == 256
    found = store.attend_to_store(query, key, value, mask, 0.25)
    wide = [x.double().repeat_interleave(heads // groups, dim=1) for x in (key, value)]
    weights = (query.double() @ wide[0].mT * 0.25).masked_fill(~seen, -torch.inf).softmax(dim=-1)
    bound = 1e-12 if device == "cpu" else 5e-3  # products may be in TF32
    torch.testing.assert_close(found.double(), weights @ wide[1], atol=bound, rtol=0)


def test_a_chunk_that_nobody_sees_has_no_weight():
    """Steps without graphs build their mask elsewhere; padding may be longer than a chunk."""
    is_valid = torch.arange(512) >= torch.tensor([[0], [300]])
    rows = AttentionRows(cos=torch.ones(4, 2, 1, 8), is_valid=is_valid)
    mask = rows.segment_mask(4, 512, torch.float32)
    assert mask.shape == (2, 1, 4, 512) and bool(mask.isfinite().all())
    _, lse = masked_forward(
        *(torch.zeros(2, 1, n, 16) for n in (4, 256, 256)), mask[..., :256], 1.0
    )
    assert bool((lse[1] < -1e29).all()) and bool((lse[0] > 0).all())


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-3), ("bf16", 0.1)])
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("name", PLANS)
def test_a_gpu_decides_the_same_from_real_graphs(one_rank, name, kv_heads, dtype, bound):
    """Rows beyond a window and a chunk of keys, one of them with more padding than a chunk has keys."""
    settings = [f"model.num_kv_heads={kv_heads}", "model.head_size=16"]
    num_given = 0 if name == "bd3lm" else 560
    objective, _, given, rows, plan = rows_of(name, num_given, settings, length=640)
    arguments = objective, dtype, given, rows, plan
    forced = {"forced": rows}  # rounding would make two rows diverge
    if num_given:
        forced["padding"] = np.array([0, 300])
    plain = one_rank.run("sample_rows", *arguments, {**forced, "cuda_graphs": False})[0]
    graphed = one_rank.run("sample_rows", *arguments, forced)[0]
    np.testing.assert_allclose(graphed["log_probs"], plain["log_probs"], atol=bound, rtol=0)
