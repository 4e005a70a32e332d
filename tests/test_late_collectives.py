"""No weight is read before it is gathered, and no gradient before it is summed, however late that is."""

import numpy as np
import pytest

pytestmark = pytest.mark.slow

BIASED = [
    "model.norm=layernorm", "model.activation=gelu", "model.mlp_bias=true", "model.attention_bias=true",
    "model.head_bias=true", "model.qk_norm=true",
]  # fmt: skip
TIED = ["model.tie_embeddings=true"]
BATCH = [
    "train.micro_batch_rows=2", "train.global_batch_rows=32",
    "optimizer.learning_rate=0.001",  # larger steps amplify rounding
]  # fmt: skip
TWO = {
    "biased": BIASED,
    "tied": TIED,
    "recomputed": ["parallel.recompute=full"],
    "graphs": ["parallel.cuda_graphs=true"],
}
FOUR = {
    "pipeline": [*TIED, "parallel.pipeline=2"],
    "interleaved": [*BIASED, "parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    "tensor": ["parallel.tensor=2"],
    "context": [*TIED, "parallel.context=2"],
}


@pytest.mark.parametrize("model", TWO)
def test_two_ranks_wait_for_weights_and_gradients(two_ranks, model):
    compare(two_ranks, TWO[model])


@pytest.mark.parametrize("layout", FOUR)
def test_four_ranks_wait_for_weights_and_gradients(four_ranks, layout):
    compare(four_ranks, FOUR[layout])


def compare(ranks, settings):
    settings = [*settings, *BATCH]
    plain = ranks.run("late_jobs.train", [*settings, "parallel.overlap=false"], False)
    late = ranks.run("late_jobs.train", [*settings, "parallel.overlap=true"], True)
    for one, other in zip(plain, late, strict=True):
        assert other["waited"] > 0
        np.testing.assert_allclose(other["losses"], one["losses"], rtol=1e-6)
        np.testing.assert_allclose(other["scores"], one["scores"], rtol=1e-6)
        for (name, _, _, value), (_, _, _, expected) in zip(
            other["weights"], one["weights"], strict=True
        ):
            np.testing.assert_allclose(value, expected, atol=1e-5, err_msg=name)
