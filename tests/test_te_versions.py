"""What the trainer asks of released Transformer Engines: the extremes of the pairs that docs/gpu.md names.

The Python code is the released one, over a stand-in for the compiled half (tests/stand_in).
tests/test_te.py tests at length the release with which Megatron-Core itself was tested.
"""

import numpy as np
import pytest

from tests import released
from tests.graph_jobs import GRAPHS

pytestmark = pytest.mark.slow

INSTALLED = ""
PAIRS = [(megatron, te) for megatron in (INSTALLED, "0.19.2") for te in ("2.9.0", "2.20.2")]
TE = ["precision.dtype=bf16", "precision.backend=te"]
EVERYTHING_IN_FP8 = [
    "precision.dtype=bf16", "precision.fp8=delayed", "precision.fp8_amax_history=4",
    "precision.fp8_attention=true", "model.head_size=128",
]  # fmt: skip


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: "-".join(filter(None, pair)))
def ranks(request, tmp_path_factory):
    megatron, te = request.param
    pool = released.te_pool(tmp_path_factory.mktemp, te, megatron)
    yield pool.run
    pool.close()


def test_fp8_everywhere_resumes_bitwise(ranks, tmp_path):
    """Products, attention and weights in FP8; weights gathered and gradients summed in the background."""
    settings = [*EVERYTHING_IN_FP8, "parallel.overlap=true"]
    job = "te_jobs.train_with_fp8_weights"
    whole = ranks(job, settings, 3, str(tmp_path), 2)[0]["losses"]
    assert ranks(job, settings, 3, str(tmp_path), None, True)[0]["losses"] == whole[2:]
    bf16 = ranks("te_jobs.on_h100", "train", [*TE, "model.head_size=128"], 3)[0]["losses"]
    np.testing.assert_allclose(whole, bf16, rtol=0.05)


def test_graphs_train_the_same_weights(ranks):
    settings = [*TE, "precision.attention=te", "parallel.tensor=2", "objective.alpha_0=0.5"]
    plain = ranks("graph_jobs.train_te", settings)[0]
    graphed = ranks("graph_jobs.train_te", [*settings, GRAPHS])[0]
    assert graphed["replays"] > 0
    assert (graphed["losses"], graphed["scores"]) == (plain["losses"], plain["scores"])
    for one, other in zip(graphed["weights"], plain["weights"], strict=True):
        np.testing.assert_array_equal(one[3], other[3], err_msg=one[0])


def test_user_buffers_change_no_loss(ranks):
    settings = [*TE, "precision.fp8=tensorwise", "parallel.tensor=2", "train.micro_batch_rows=4"]
    plain = ranks("te_jobs.with_buffers", settings)[0]
    found = ranks("te_jobs.with_buffers", [*settings, "parallel.tensor_overlap=true"])[0]
    assert plain["shapes"] == set()
    assert found["shapes"] == {((4 * 16, 32), 2)}
    assert found["losses"] == plain["losses"]


def test_the_choice_of_attention_is_understood(ranks):
    chosen, refusal = ranks("te_jobs.attention_choices")[0]
    assert chosen == "FusedAttention"
    assert "Disabling FusedAttention" in refusal


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param([], id="bf16"),
        pytest.param(["precision.deterministic=true", "parallel.tensor=2"], id="deterministic"),
        pytest.param(EVERYTHING_IN_FP8, id="fp8"),
    ],
)
def test_layers_ask_for_the_attention_that_was_asked_about_at_the_start(ranks, settings):
    """Otherwise a run that could work is refused, or a run ends in its first step."""
    settings = [*TE, "precision.attention=te", "train.micro_batch_rows=2", *settings]
    assert ranks("te_jobs.questions", settings)[0] == {}
