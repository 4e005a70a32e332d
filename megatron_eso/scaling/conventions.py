"""The FLOP count of the published study (arXiv 2602.15014), to stand beside our own.

Its counter sees matrix products, but not those inside the attention kernel. It counts the head on every
token. The conditioning network of its transformer (adaLN) works once a row. No run of it has more than one
stack row for a data row; where ours have, such a counter would see all of them, and so does this count.
"""

from megatron_eso.config.schema import ModelConfig, ObjectiveConfig
from megatron_eso.plan.flops import matrix_parameters_per_layer, shares

CONDITION = 128  # entries of the condition that adaLN gets
FREQUENCIES = 256  # sinusoidal features of the noise level


def published_forward_macs(
    model: ModelConfig, objective: ObjectiveConfig, sequence_length: int
) -> float:
    """Return the forward multiply-adds of one data row as the published study counts them.

    A multiply-add is two FLOPs. A training step costs three forward passes.

    Args:
        model: shape.
        objective: decides the stack rows.
        sequence_length: tokens of the row.
    """
    hidden = model.hidden_size
    layers = matrix_parameters_per_layer(model) * model.num_layers
    per_token = layers * shares(objective, sequence_length).stack_rows + model.vocab_size * hidden
    conditioning = (
        CONDITION * 6 * hidden * model.num_layers
        + CONDITION * 2 * hidden
        + FREQUENCIES * CONDITION
        + CONDITION * CONDITION
    )
    return per_token * sequence_length + conditioning
