"""What the configuration becomes for Megatron on a GPU; no GPU needed to build it."""

import pytest
import torch
from torch.nn.functional import silu

from megatron_eso.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_eso.model.megatron_config import transformer_config

# Megatron says this about its own default.
pytestmark = pytest.mark.filterwarnings("ignore:full scope is deprecated")


def on_gpu(**model):
    precision = PrecisionConfig(dtype="bf16", backend="torch", attention="split")
    return transformer_config(ModelConfig(**model), ParallelConfig(), precision, on_gpu=True)


@pytest.mark.parametrize(("activation", "is_fused"), [("swiglu", True), ("gelu", False)])
def test_swiglu_is_fused_on_a_gpu(activation, is_fused):
    """Megatron has no fused form of the tanh GELU."""
    assert on_gpu(activation=activation).bias_activation_fusion is is_fused


@pytest.mark.slow
def test_the_fused_swiglu_is_the_same_function(one_rank):
    values, gradients, expected_values, expected_gradients = one_rank.run("fused_swiglu")[0]
    torch.testing.assert_close(torch.tensor(values), torch.tensor(expected_values))
    torch.testing.assert_close(torch.tensor(gradients), torch.tensor(expected_gradients))


def test_weights_are_made_where_they_live():
    config = on_gpu()
    assert not config.use_cpu_initialization
    assert config.activation_func is silu
