"""Every layout computes the same loss and the same gradients as one rank."""

import numpy as np
import pytest

from tests.rank_jobs import assemble

pytestmark = pytest.mark.slow

OBJECTIVES = {
    "hybrid": ["objective.alpha_0=0.5"],
    "diffusion": ["objective.alpha_0=1"],
    "sequential": ["objective.alpha_0=0"],
    "ar": ["objective.name=ar"],
    "mdlm": ["objective.name=mdlm"],
    "bd3lm": ["objective.name=bd3lm", "objective.block_size=4"],
}
TWO = {
    "tensor": ["parallel.tensor=2"],
    "tensor-without-sequence": ["parallel.tensor=2", "parallel.sequence=false"],
    "pipeline": ["parallel.pipeline=2"],
    "interleaved": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    "context": ["parallel.context=2"],
    "data": [],
}
_alone: dict = {}


def alone(one_rank, objective):
    """Return the reference: one rank, one micro-batch size for all rows, no recomputation."""
    if objective not in _alone:
        _alone[objective] = one_rank.run("loss_and_gradients", OBJECTIVES[objective])[0]
    return _alone[objective]


def assert_same(reference, replies):
    for reply in replies:
        assert reply["counts"] == reference["counts"]
        np.testing.assert_allclose(reply["sums"], reference["sums"], rtol=2e-6, atol=1e-5)
    whole = assemble([reply["gradients"] for reply in replies])
    expected = assemble([reference["gradients"]])
    assert whole.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(
            whole[name], gradient, rtol=0, atol=2e-5 * scale + 1e-9, err_msg=name
        )


@pytest.mark.parametrize("layout", TWO)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_ranks_compute_what_one_computes(one_rank, two_ranks, objective, layout):
    replies = two_ranks.run("loss_and_gradients", [*OBJECTIVES[objective], *TWO[layout]])
    assert_same(alone(one_rank, objective), replies)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(["train.micro_batch_rows=2"], id="more-accumulation"),
        pytest.param(["parallel.recompute=full"], id="recompute-layers"),
        pytest.param(["parallel.recompute=attention"], id="recompute-attention"),
        pytest.param(["precision.attention=dense"], id="dense-attention"),
    ],
)
def test_one_rank_computes_the_same_another_way(one_rank, change):
    replies = one_rank.run("loss_and_gradients", [*OBJECTIVES["hybrid"], *change])
    assert_same(alone(one_rank, "hybrid"), replies)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(["parallel.tensor=2", "parallel.pipeline=2"], id="tensor-pipeline"),
        pytest.param(["parallel.tensor=2", "train.micro_batch_rows=2"], id="tensor-data"),
        pytest.param(["parallel.pipeline=2", "train.micro_batch_rows=2"], id="pipeline-data"),
        # Tensor x context ranks outnumber the key/value heads here: context ranks get copies.
        pytest.param(["parallel.tensor=2", "parallel.context=2"], id="tensor-context"),
        pytest.param(["parallel.pipeline=2", "parallel.context=2"], id="pipeline-context"),
        pytest.param(["parallel.context=2", "train.micro_batch_rows=2"], id="context-data"),
        pytest.param(["parallel.context=4"], id="context"),
    ],
)
def test_four_ranks_compute_what_one_computes(one_rank, four_ranks, layout):
    replies = four_ranks.run("loss_and_gradients", [*OBJECTIVES["hybrid"], *layout])
    assert_same(alone(one_rank, "hybrid"), replies)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param([], id="data"),
        pytest.param(["model.tie_embeddings=true", "parallel.pipeline=2"], id="pipeline"),
        pytest.param(["parallel.pipeline=2", "parallel.virtual_pipeline=2"], id="interleaved"),
    ],
)
def test_overlapped_communication_trains_the_same_weights(two_ranks, layout):
    """Several micro-batches and steps: gradients reduced once, weights gathered before use."""
    settings = [*layout, "train.micro_batch_rows=2"]
    plain = two_ranks.run("train", [*settings, "parallel.overlap=false"], 3)
    hidden = two_ranks.run("train", [*settings, "parallel.overlap=true"], 3)
    for one, other in zip(plain, hidden, strict=True):
        np.testing.assert_allclose(other["losses"], one["losses"], rtol=1e-6)
        for (name, _, _, value), (_, _, _, expected) in zip(
            other["weights"], one["weights"], strict=True
        ):
            np.testing.assert_allclose(value, expected, atol=1e-5, err_msg=name)


def test_tied_embeddings_give_the_same_gradients_across_a_pipeline(one_rank, two_ranks):
    tied = ["model.tie_embeddings=true"]
    reference = one_rank.run("loss_and_gradients", tied)[0]
    for layout in (["parallel.pipeline=2"], ["parallel.tensor=2"]):
        assert_same(reference, two_ranks.run("loss_and_gradients", [*tied, *layout]))


def test_the_layernorm_gelu_bias_variant_is_the_same_at_tensor_two(one_rank, two_ranks):
    variant = [
        "model.norm=layernorm", "model.activation=gelu", "model.mlp_bias=true",
        "model.attention_bias=true", "model.head_bias=true", "model.qk_norm=true",
    ]  # fmt: skip
    reference = one_rank.run("loss_and_gradients", variant)[0]
    assert_same(reference, two_ranks.run("loss_and_gradients", [*variant, "parallel.tensor=2"]))


def test_a_tensor_rank_that_holds_padding_alone_changes_nothing(one_rank, two_ranks):
    padded = ["model.vocab_padding_multiple=128"]  # of 61 tokens, none is on the second rank
    reference = one_rank.run("loss_and_gradients", padded)[0]
    assert_same(reference, two_ranks.run("loss_and_gradients", [*padded, "parallel.tensor=2"]))


def test_initial_weights_do_not_depend_on_the_layout(one_rank, two_ranks):
    expected = assemble(one_rank.run("weights", []))
    for layout in TWO.values():
        whole = assemble(two_ranks.run("weights", layout))
        assert all(np.array_equal(whole[name], expected[name]) for name in expected)


def test_scores_do_not_depend_on_the_layout(one_rank, two_ranks):
    settings = ["eval.likelihood_orders=3", "eval.micro_batch_rows=6"]
    expected = one_rank.run("scores", settings, 7)[0]
    for layout in TWO.values():
        for reply in two_ranks.run("scores", [*settings, *layout], 7):
            assert [r[0] for r in reply] == [e[0] for e in expected]
            np.testing.assert_allclose([r[1:] for r in reply], [e[1:] for e in expected], rtol=1e-5)


def test_padding_stays_padding_on_the_ranks_that_receive_it(two_ranks):
    expected = [[0, 5, 0, 7]], [[True, True, False, False]]
    assert two_ranks.run("received", ["parallel.tensor=2"]) == [expected] * 2


@pytest.mark.parametrize("kind", ["DataError", "OSError"])
def test_a_failure_to_read_on_one_rank_is_an_error_on_all(two_ranks, kind):
    messages = two_ranks.run("read_with_failure", 1, kind)
    assert messages == ["rank 1: shard x is gone"] * 2
