"""The FLOP count of the published study (arXiv 2602.15014), to stand beside our own.

Its counter sees matrix products, but not those inside the attention kernel. It counts the head on every
token. The conditioning network of its transformer (adaLN) works once a row.
"""

from megatron_eso.config.schema import ModelConfig
from megatron_eso.plan.flops import matrix_parameters_per_layer

CONDITION = 128  # entries of the condition that adaLN gets
FREQUENCIES = 256  # sinusoidal features of the noise level


def published_forward_macs(model: ModelConfig, sequence_length: int) -> float:
    """Return the forward multiply-adds of one row as the published study counts them.

    A multiply-add is two FLOPs. A training step costs three forward passes.

    Args:
        model: shape.
        sequence_length: tokens of the row.
    """
    hidden = model.hidden_size
    per_token = matrix_parameters_per_layer(model) * model.num_layers + model.vocab_size * hidden
    conditioning = (
        CONDITION * 6 * hidden * model.num_layers
        + CONDITION * 2 * hidden
        + FREQUENCIES * CONDITION
        + CONDITION * CONDITION
    )
    return per_token * sequence_length + conditioning
