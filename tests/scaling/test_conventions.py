"""Our count of operations against the published convention and against a counter of the real model."""

from pathlib import Path

import pytest

from megatron_eso.config.load import load_config
from megatron_eso.config.schema import ObjectiveConfig
from megatron_eso.plan.flops import model_flops_per_step
from megatron_eso.scaling.conventions import published_forward_macs

LADDER = Path(__file__).parents[2] / "configs" / "model" / "ladder"


@pytest.mark.parametrize(("size", "giga"), [("6M", 26.4427), ("113M", 224.287), ("2121M", 3400.9)])
def test_the_published_convention_is_reproduced(size, giga):
    model = load_config(LADDER / f"{size}.yaml").model
    digits = len(str(giga).split(".")[1])
    assert round(published_forward_macs(model, ObjectiveConfig(), 2048) / 1e9, digits) == giga


@pytest.mark.parametrize(
    "objective",
    [
        ObjectiveConfig(name="ar"),
        ObjectiveConfig(name="mdlm"),
        ObjectiveConfig(name="bd3lm"),
        *(ObjectiveConfig(alpha_0=share) for share in (0.0, 0.25, 1.0)),
    ],
    ids=lambda o: f"{o.name}-{o.alpha_0:g}",
)
def test_the_published_convention_counts_every_row_that_passes_the_layers(objective):
    """Their counter saw one row only because no published run has an objective with more."""
    model = load_config(LADDER / "302M.yaml").model
    ours = model_flops_per_step(model, objective, sequence_length=2048, rows=1)
    head = model.hidden_size * model.vocab_size * 2048
    found = published_forward_macs(model, objective, 2048)
    assert found == pytest.approx(ours.layers / 2 + head, rel=1e-3)


def test_the_ladder_has_all_28_published_sizes():
    sizes = [p.stem for p in LADDER.glob("*M.yaml")]
    assert len(sizes) == 28
    for size in sizes:
        model = load_config(LADDER / f"{size}.yaml").model
        assert model.hidden_size % model.num_heads == 0
        # The names also count the conditioning network, which folds away.
        inner = 12 * model.hidden_size**2 * model.num_layers
        assert 0.7 <= inner / (float(size[:-1]) * 1e6) <= 1.1, size
