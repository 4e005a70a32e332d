"""The optimizer Megatron builds updates as AdamW's formula says, in one pass over each parameter."""

import numpy as np


def test_three_updates_follow_the_formula(one_rank):
    found = one_rank.run("updates", [], 3)[0]
    for ours, expected in zip(found["weights"], found["expected"], strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6)


def test_torch_updates_a_parameter_in_one_pass(one_rank):
    found = one_rank.run("updates", [], 1)[0]
    assert found["kinds"] == ["AdamW"]
    assert all(found["is_fused"])
