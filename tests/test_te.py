"""Layers of Transformer Engine: its released Python code and Megatron's wrappers, on a CPU.

A stand-in (tests/stand_in) computes what its compiled half would. Tested: the layers are asked for what
they can do, compute what the torch layers compute, and have the same checkpoints. Transformer Engine's own
code gathers, rounds, keeps and refuses. Not tested: anything about its kernels.
"""

import numpy as np
import pytest

from megatron_eso.checkpoint.compare import compare
from megatron_eso.checkpoint.folder import CheckpointFolder, folder_of_step
from tests.rank_jobs import assemble
from tests.test_layouts import assert_same

pytestmark = pytest.mark.slow

TE, TORCH = ["precision.backend=te"], ["precision.backend=torch"]
LAYERNORM = ["model.norm=layernorm", "model.activation=gelu"]
SHAPES = {
    "llama": [],
    "qwen3": ["model.qk_norm=true"],
    "official": [*LAYERNORM, "model.mlp_bias=true", "model.head_bias=true"],
    "all-biases": [*LAYERNORM, "model.mlp_bias=true", "model.attention_bias=true", "model.qk_norm=true"],
    "attention-bias": ["model.attention_bias=true"],
}  # fmt: skip
LAYOUTS = {
    "data": [],
    "tensor": ["parallel.tensor=2"],
    "tensor-without-sequence": ["parallel.tensor=2", "parallel.sequence=false"],
}
FP8 = ["precision.dtype=bf16", "precision.fp8=delayed", "precision.fp8_amax_history=4"]
TENSORWISE = ["precision.dtype=bf16", "precision.fp8=tensorwise"]
BF16_ATTENTION = ["precision.dtype=bf16", "precision.attention=te"]
FP8_ATTENTION = [
    "precision.dtype=bf16", "precision.fp8=tensorwise", "precision.fp8_attention=true",
    "model.head_size=128", "precision.bf16_first_layers=1",
]  # fmt: skip


@pytest.fixture
def ranks(te_ranks):
    return lambda job, *args: te_ranks.run(f"te_jobs.{job}", *args)


def test_the_layers_are_megatrons_transformer_engine_classes(ranks):
    classes = ranks("layers", [*TE, "precision.dtype=bf16", "precision.attention=te"])[0]
    assert classes == {
        "self_attention.linear_qkv": "TELayerNormColumnParallelLinear",
        "self_attention.linear_proj": "TERowParallelLinear",
        "self_attention.core_attention.fused": "TEDotProductAttention",
        "mlp.linear_fc1": "TELayerNormColumnParallelLinear",
        "mlp.linear_fc2": "TERowParallelLinear",
    }


@pytest.mark.parametrize(
    ("shape", "layout"),
    [*(("llama", layout) for layout in LAYOUTS), *((s, "tensor") for s in SHAPES if s != "llama")],
)
def test_te_layers_give_the_loss_and_gradients_of_torch_layers(ranks, shape, layout):
    """This also compares names and shapes: gradients come as pieces of the sharded state's tensors."""
    settings = [*SHAPES[shape], *LAYOUTS[layout]]
    reference = ranks("on_h100", "loss_and_gradients", [*settings, *TORCH])
    found = ranks("on_h100", "loss_and_gradients", [*settings, *TE])
    for mine, theirs in zip(found, reference, strict=True):
        assert sorted(map(_place, mine["gradients"])) == sorted(map(_place, theirs["gradients"]))
    whole = {**reference[0], "gradients": [g for reply in reference for g in reply["gradients"]]}
    assert_same(whole, found)


def _place(piece):
    return repr(piece[:3])  # name, shape of the whole, slices


@pytest.mark.parametrize("layout", [*LAYOUTS, "context"])
def test_te_attention_with_merged_copies_is_split_attention(ranks, layout):
    """Its kernels take only bf16: it must be as close to fp64 attention as split attention in bf16."""
    settings = LAYOUTS.get(layout, ["parallel.context=2"])
    exact = ranks("passes", [*settings, *TORCH], "fp64")
    split, te = (
        ranks("passes", [*settings, *TE, f"precision.attention={attention}"], "bf16")
        for attention in ("split", "te")
    )
    for one, near, other in zip(exact, split, te, strict=True):
        assert len(one["log_probs"]) > 0
        allowed = 1.5 * _distance(near["log_probs"], one["log_probs"])
        assert 0 < _distance(other["log_probs"], one["log_probs"]) < allowed
    theirs, near, mine = (
        assemble([reply["gradients"] for reply in replies]) for replies in (exact, split, te)
    )
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        allowed = 1.5 * _distance(near[name], gradient) + 1e-3
        assert _distance(mine[name], gradient) < allowed, name


def test_te_attention_gets_rows_without_gaps_between_them(ranks):
    """Its kernels read on from a pointer; it notices a slice's gaps only where keys and values differ."""
    assert max(ranks("attention_of_a_slice", [*TE, *BF16_ATTENTION])) < 0.02


def _distance(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(("first", "second"), [(TE, TORCH), (TORCH, TE)], ids=["to-torch", "to-te"])
def test_a_checkpoint_moves_between_te_and_torch_layers(ranks, tmp_path, first, second):
    whole = ranks("on_h100", "train", [*first, "parallel.tensor=2"], 4, str(tmp_path), 2)
    again = ranks("on_h100", "train", second, 4, str(tmp_path), None, True)
    np.testing.assert_allclose(again[0]["losses"], whole[0]["losses"][2:], rtol=1e-6)
    expected, found = (assemble([r["weights"] for r in replies]) for replies in (whole, again))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        np.testing.assert_allclose(found[name], weight, atol=2e-4, err_msg=name)


@pytest.mark.parametrize(
    ("recipe", "layout"),
    [(FP8, "tensor"), (FP8_ATTENTION, "tensor"), (FP8_ATTENTION, "context"), (FP8, "pipeline")],
    ids=["linears", "attention", "attention-context", "linears-pipeline"],
)
def test_fp8_state_is_saved_and_makes_a_resume_bitwise(ranks, tmp_path, recipe, layout):
    settings = [*recipe, f"parallel.{layout}=2"]
    whole = ranks("on_h100", "train", settings, 4, str(tmp_path), 2)
    again = ranks("on_h100", "train", settings, 4, str(tmp_path), None, True)
    assert again[0]["losses"] == whole[0]["losses"][2:]
    # Also at another layout, where sums are in another order.
    moved = ranks("on_h100", "train", recipe, 4, str(tmp_path), None, True)
    np.testing.assert_allclose(moved[0]["losses"], whole[0]["losses"][2:], rtol=2e-2)
    ranks("without_fp8_state", folder_of_step(tmp_path, 2).path.as_posix())
    fresh = ranks("on_h100", "train", settings, 4, str(tmp_path), None, True)
    assert fresh[0]["losses"] != whole[0]["losses"][2:]


@pytest.mark.parametrize(
    "recipe", [FP8, TENSORWISE, FP8_ATTENTION], ids=["delayed", "tensorwise", "attention"]
)
def test_weights_kept_in_fp8_train_and_resume_bitwise(ranks, tmp_path, recipe):
    """Rounding depends on scales, which are loaded too; gathering in the background does not change it."""
    job, overlap = "train_with_fp8_weights", "parallel.overlap=true"
    plain = ranks(job, recipe, 4, str(tmp_path / "one"), 2)[0]["losses"]
    assert ranks(job, [*recipe, overlap], 4, str(tmp_path / "two"), 2)[0]["losses"] == plain
    for folder, settings in {"one": recipe, "two": [*recipe, overlap]}.items():
        again = ranks(job, settings, 4, str(tmp_path / folder), None, True)
        assert again[0]["losses"] == plain[2:]
    moved = ranks(job, [*recipe, "parallel.tensor=2"], 4, str(tmp_path / "one"), None, True)
    np.testing.assert_allclose(moved[0]["losses"], plain[2:], rtol=2e-2)
    beside = ranks("on_h100", "train", recipe, 4)[0]["losses"]  # with weights in bf16
    np.testing.assert_allclose(plain, beside, rtol=2e-2)


@pytest.mark.parametrize("recipe", [FP8, TENSORWISE], ids=["delayed", "tensorwise"])
def test_looking_at_whole_fp8_weights_changes_no_gradient(ranks, recipe):
    settings = [*recipe, "parallel.overlap=true"]
    assert ranks("looked_at", settings, True) == ranks("looked_at", settings, False)


@pytest.mark.parametrize("recipe", [FP8, FP8_ATTENTION], ids=["products", "attention"])
def test_a_step_that_is_not_applied_leaves_no_trace_in_scales(ranks, recipe):
    job = "losses_after_a_step_not_applied"
    assert ranks(job, recipe, 2) == ranks(job, recipe, 0)


def test_fp8_weights_have_seen_no_memory_that_nobody_had_written_to(ranks):
    """The stand-in puts a large number there; delayed scales would follow it for a whole history."""
    assert 0 < ranks("largest_weight_in_history", FP8)[0] < 1


def test_passes_outside_of_training_see_the_weights_and_keep_the_gradients(ranks):
    """Transformer Engine rounds weights, and overwrites gradients, in a step's first micro-batch."""
    # Without sums over ranks: a second call would also sum the first one's gradients again.
    layout = ["parallel.tensor=2", "parallel.sequence=false"]
    found = ranks("log_probability_passes", [*TENSORWISE, *layout])[0]
    assert np.abs(np.subtract(*found["values"])).min() > 1e-2
    once, twice = (found[name].numpy() for name in ("once", "twice"))
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-4, atol=1e-5 * np.abs(once).max())
    again = ranks("log_probability_passes", [*TENSORWISE, *layout, "parallel.recompute=full"])[0]
    np.testing.assert_array_equal(again["after"].numpy(), found["after"].numpy())


@pytest.mark.parametrize("recipe", [FP8, FP8_ATTENTION], ids=["linears", "attention"])
def test_an_evaluation_changes_no_scale(ranks, recipe):
    assert ranks("beside_evaluations", recipe, True) == ranks("beside_evaluations", recipe, False)


def test_sampling_with_layers_in_fp8_is_refused(ranks):
    """Their products cannot take a single token; a checkpoint is sampled in bf16."""
    assert "load the checkpoint in bf16" in ranks("refused_sampling", FP8)[0]


def test_a_checkpoint_with_fp8_state_loads_without_fp8_and_the_other_way(ranks, tmp_path):
    with_state, without = tmp_path / "with", tmp_path / "without"
    ranks("on_h100", "train", FP8, 2, str(with_state), 2)
    bf16 = [*TORCH, "precision.dtype=bf16"]
    assert ranks("on_h100", "train", bf16, 3, str(with_state), None, True)[0]["losses"]
    ranks("on_h100", "train", bf16, 2, str(without), 2)
    assert ranks("on_h100", "train", FP8, 3, str(without), None, True)[0]["losses"]
    found = compare(*(CheckpointFolder(folder_of_step(f, 2).path) for f in (with_state, without)))
    assert {d.group for d in found} == {"weights", "exp_avg", "exp_avg_sq", "ema"}


def test_a_hostile_pickle_in_the_place_of_fp8_state_is_not_run(ranks, tmp_path):
    ranks("on_h100", "train", FP8, 2, str(tmp_path), 2)
    folder, trace = folder_of_step(tmp_path, 2).path, tmp_path / "it_ran"
    ranks("put_hostile_fp8_state", str(folder), str(trace))
    with pytest.raises(AssertionError) as failed:
        ranks("on_h100", "train", FP8, 3, str(tmp_path), None, True)
    assert not trace.exists()
    said = "its pickle names posix.mkdir, which no tensor needs; it was not run"
    assert str(failed.value).count(said) == 2  # both ranks


def test_the_adapter_reports_the_choice_and_refuses_the_unfused_backend(ranks):
    chosen, refusal = ranks("attention_choices")[0]
    assert chosen == "FusedAttention"
    assert "UnfusedDotProductAttention" in refusal
    assert "Disabling FusedAttention" in refusal
    assert "precision.attention=split" in refusal


# Both passes of four products, and the two sums that Megatron asks to overlap with products.
USED = {f"{n}_{p}" for n in ("qkv", "proj", "fc1", "fc2") for p in ("fprop", "dgrad")} | {
    "qkv_wgrad", "fc1_wgrad",
}  # fmt: skip
BUFFERS = [
    "parallel.tensor=2", "precision.dtype=bf16", *TE, "parallel.tensor_overlap=true",
    "objective.alpha_0=0.5", "train.micro_batch_rows=4",
]  # fmt: skip


@pytest.mark.parametrize("precision", [[], FP8, FP8_ATTENTION], ids=["bf16", "fp8", "bf16-ends"])
def test_user_buffers_have_the_shape_of_every_micro_batch(ranks, precision):
    """The stand-in fails on any other shape; evaluations take 3 or 2 stack rows per row, of its 4."""
    settings = [*BUFFERS, *precision]
    plain = ranks("with_buffers", [*settings, "parallel.tensor_overlap=false"])[0]
    found = ranks("with_buffers", settings)[0]
    assert plain["shapes"] == set()
    assert found["shapes"] == {((4 * 16, 32), 2)}
    modes = {0: {"none"}, len(FP8): {"fp8"}, len(FP8_ATTENTION): {"fp8", "none"}}[len(precision)]
    assert {mode for _, mode in found["uses"]} == modes
    for mode in modes:
        trained = {name for (name, m), n in found["used_by_step"].items() if m == mode and n}
        assert trained == USED
    evaluated = ("proj_fprop", max(modes))
    assert found["uses"][evaluated] > found["used_by_step"][evaluated]
    assert found["losses"] == plain["losses"]
    near = 1e-3 if precision else 1e-6
    np.testing.assert_allclose(found["scores"], plain["scores"], rtol=near)
    np.testing.assert_allclose(found["log_probability"], plain["log_probability"], rtol=near)
    assert plain["refusal"] == ""
    assert (
        "6 stack rows of 16 tokens do not fit the user buffers, which hold 4 of 16"
        in found["refusal"]
    )


def test_buffers_that_the_machine_cannot_have_say_so(ranks):
    said = ranks("refused_buffers", BUFFERS)[0]
    assert said.startswith(
        "parallel.tensor_overlap=true: Transformer Engine has no user buffers of 64 tokens x 32 for 2 "
        "tensor ranks here (CUDA device, driver and/or toolkit version does not support"
    )
    assert said.endswith("set it to false")
