"""Random models, objectives and layouts compute what one rank computes with a dense mask.

test_layouts.py changes one thing at a time; faults hide where several meet. Each number is its own case,
the same on every machine. For more cases: ``RANDOM_CASES=200 pytest tests/test_random_settings.py``.
"""

import os
import random

import numpy as np
import pytest

from megatron_eso.config.check import violations
from tests.rank_jobs import small_config
from tests.test_layouts import assert_same

pytestmark = pytest.mark.slow

CASES = int(os.environ.get("RANDOM_CASES", "6"))
SWITCHES = ("attention_bias", "mlp_bias", "head_bias", "qk_norm", "tie_embeddings")
ONE_RANK = ["precision.attention=dense", "train.micro_batch_rows=2", "parallel.sequence=false"]


def random_model(draw):
    """Return settings of a model, its objective and its optimizer."""
    heads, layers = draw.choice([2, 4, 8]), draw.choice([2, 4, 8])
    settings = {
        "num_heads": heads, "num_layers": layers, "head_size": draw.choice([8, 16]),
        "num_kv_heads": draw.choice([n for n in (1, 2, 4, 8) if heads % n == 0]),
        "ffn_size": draw.choice([32, 64, 96]), "vocab_padding_multiple": draw.choice([8, 64, 128]),
        "norm": draw.choice(["rmsnorm", "layernorm"]), "activation": draw.choice(["swiglu", "gelu"]),
        **{name: draw.choice(["true", "false"]) for name in SWITCHES},
    }  # fmt: skip
    objective = draw.choice(
        ["name=eso alpha_0=0", "name=eso alpha_0=0.1", "name=eso alpha_0=0.9", "name=eso alpha_0=1",
         "name=eso alpha_0=0.5 diffusion_fraction=0.25", "name=ar", "name=ar leading_mask=false",
         "name=mdlm loss_weight=constant", "name=bd3lm block_size=2", "name=bd3lm block_size=16"]
    )  # fmt: skip
    return [
        *(f"model.{name}={value}" for name, value in settings.items()),
        *(f"objective.{each}" for each in objective.split()),
        f"objective.noise_eps={draw.choice([0, 0.001, 0.1])}",
        f"train.global_batch_rows={draw.choice([8, 16, 24])}", f"train.seed={draw.randrange(1000)}",
        f"optimizer.weight_decay={draw.choice([0, 0.3])}",
        f"optimizer.clip_grad_norm={draw.choice([0, 0.5])}",
    ]  # fmt: skip


def random_layout(draw, num_ranks):
    """Return the settings of a layout for a number of ranks."""
    sizes = [(t, p, c) for t in (1, 2, 4) for p in (1, 2, 4) for c in (1, 2, 4)]
    kinds = [s for s in sizes if np.prod(s) in (num_ranks, num_ranks // 2)]
    tensor, pipeline, context = draw.choice(kinds)
    return [
        f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", f"parallel.context={context}",
        f"parallel.virtual_pipeline={draw.choice([1, 2]) if pipeline > 1 else 1}",
        f"parallel.sequence={draw.choice(['true', 'false'])}",
        f"parallel.recompute={draw.choice(['none', 'attention', 'full'])}",
        f"parallel.overlap={draw.choice(['true', 'false'])}",
        f"precision.attention={draw.choice(['split', 'dense'])}",
        f"train.micro_batch_rows={draw.choice([2, 4])}",
    ]  # fmt: skip


def random_case(number):
    """Return a model's settings and, for a number of ranks, those of a layout that the rules allow."""
    draw = random.Random(f"case {number}")
    while True:
        num_ranks = draw.choice([2, 2, 4])
        model, layout = random_model(draw), random_layout(draw, num_ranks)
        alone = small_config([*model, *ONE_RANK])
        if not violations(alone, 1) + violations(small_config([*model, *layout]), num_ranks):
            return model, layout, num_ranks


@pytest.mark.parametrize("number", range(CASES))
def test_any_settings_compute_what_one_rank_computes(one_rank, two_ranks, four_ranks, number):
    model, layout, num_ranks = random_case(number)
    ranks = {2: two_ranks, 4: four_ranks}[num_ranks]
    print(f"{num_ranks} ranks:", *model, *layout)
    expected = one_rank.run("loss_and_gradients", [*model, *ONE_RANK])[0]
    assert_same(expected, ranks.run("loss_and_gradients", [*model, *layout]))
    trained = one_rank.run("train", [*model, *ONE_RANK], 3)[0]
    replies = ranks.run("train", [*model, *layout], 3)
    for reply in replies:
        np.testing.assert_allclose(reply["losses"], trained["losses"], rtol=1e-4)
    scores = one_rank.run("scores", [*model, *ONE_RANK], 5)[0]
    for reply in ranks.run("scores", [*model, *layout], 5):
        assert [r[0] for r in reply] == [s[0] for s in scores]
        np.testing.assert_allclose([r[1:] for r in reply], [s[1:] for s in scores], rtol=2e-5)
