"""The FLOP count of the published study (arXiv 2602.15014), to stand beside our own.

Its counter sees matrix products but not the attention kernel, counts the head on every token, and the
conditioning network (adaLN) of its transformer, whose condition has 128 entries, once a row.
"""

from megatron_eso.config.schema import ModelConfig
from megatron_eso.plan.flops import matrix_parameters_per_layer

CONDITION = 128
FREQUENCIES = 256  # sinusoidal features of the noise level


def published_forward_macs(model: ModelConfig, sequence_length: int) -> float:
    """Return the forward multiply-adds of one row as the published study counts them."""
    hidden = model.hidden_size
    per_token = matrix_parameters_per_layer(model) * model.num_layers + model.vocab_size * hidden
    conditioning = (
        CONDITION * 6 * hidden * model.num_layers
        + CONDITION * 2 * hidden
        + FREQUENCIES * CONDITION
        + CONDITION * CONDITION
    )
    return per_token * sequence_length + conditioning
