"""The differentiable log-probability of rows: finite differences, the sampler, every layout."""

import numpy as np
import pytest
import torch

from tests.rank_jobs import LENGTH, VOCAB, direction

pytestmark = pytest.mark.slow

NUM_ROWS = 4
WEIGHTS = [0.7, -1.3, 0.4, 1.1]  # advantages of a policy-gradient step
TWO = {
    "tensor": ["parallel.tensor=2", "parallel.sequence=false"],
    "pipeline": ["parallel.pipeline=2"],
    "context": ["parallel.context=2"],
    "interleaved": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
}


def rows_and_orders():
    """Return rows, each with its own order; the last row ends in padding."""
    generator = torch.Generator().manual_seed(8)
    tokens = torch.randint(0, VOCAB - 1, (NUM_ROWS, LENGTH), generator=generator)
    valid = torch.ones(NUM_ROWS, LENGTH, dtype=torch.bool)
    valid[-1, LENGTH - 3 :] = False
    keys = torch.rand(NUM_ROWS, LENGTH, generator=generator) + (~valid).float()
    return tokens.numpy(), keys.argsort(dim=1).numpy(), valid.numpy()


def whole(parts):
    found = {}
    for name, shape, slices, data in [piece for rank in parts for piece in rank]:
        found.setdefault(name, np.full(shape, np.nan))[slices] = data
    return found


def slope_of(gradients):
    return sum(
        float((gradient * direction(name, gradient.shape).numpy()).sum())
        for name, gradient in gradients.items()
    )


@pytest.fixture(scope="module")
def alone(one_rank):
    return one_rank.run("log_probability_gradient", [], *rows_and_orders(), WEIGHTS)[0]


def test_the_gradient_equals_finite_differences_in_float64(alone):
    gradients = whole([alone["gradients"]])
    assert slope_of(gradients) == pytest.approx(alone["slope"], rel=1e-6)
    direct = whole([alone["direct"]["gradients"]])
    np.testing.assert_allclose(alone["direct"]["values"], alone["values"], rtol=1e-12)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(direct[name], gradient, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("layout", TWO)
def test_two_ranks_give_the_same_values_and_gradients(alone, two_ranks, layout):
    replies = two_ranks.run("log_probability_gradient", TWO[layout], *rows_and_orders(), WEIGHTS)
    expected = whole([alone["gradients"]])
    for reply in replies:
        np.testing.assert_allclose(reply["values"], alone["values"], rtol=1e-10)
        assert reply["slope"] == pytest.approx(alone["slope"], rel=1e-6)
    ways = [[reply["gradients"] for reply in replies]]
    if layout != "pipeline" and layout != "interleaved":
        ways.append([reply["direct"]["gradients"] for reply in replies])
    for way in ways:
        found = whole(way)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            np.testing.assert_allclose(found[name], gradient, atol=1e-9, err_msg=name)


def test_it_is_what_the_sampler_assigns(alone, one_rank):
    tokens, orders, _ = rows_and_orders()
    # The sampler has no padding: a row's log-probability without it is the sum over its valid entries.
    assigned = one_rank.run("forced_log_probs", [], tokens, orders)[0]
    summed = [assigned[row][rows_and_orders()[2][row]].sum() for row in range(NUM_ROWS)]
    np.testing.assert_allclose(summed, alone["values"], rtol=1e-10)
