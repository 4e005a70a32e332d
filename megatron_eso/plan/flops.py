"""Floating-point operations of one training step, counted for what this trainer really computes.

A multiply-add is two operations. Norms, rotations and other element-wise work are left out, as in
every published model FLOP/s. There are two conventions for causal attention: all L^2 pairs (Megatron's
table) or the half that is computed (NeMo's). Both are given; ``training`` uses the half.
"""

from dataclasses import dataclass

from megatron_eso.config.derive import diffusion_fraction, ffn_size, head_size, num_kv_heads
from megatron_eso.config.schema import ModelConfig, ObjectiveConfig


@dataclass(frozen=True)
class Flops:
    """Forward operations by part; a training step does three times as many."""

    layers: float
    """Matrix products of the layers."""
    attention: float
    """Scores and weighted values, of the pairs that are computed."""
    attention_full: float
    """The same, counting every pair of a row (block diffusion: of a row and the keys it is given)."""
    head: float
    """Output head on entries with loss."""

    @property
    def forward(self) -> float:
        """All parts, causal attention counted as half."""
        return self.layers + self.attention + self.head

    @property
    def training(self) -> float:
        """Forward and backward."""
        return 3 * self.forward

    def hardware(self, recompute: str) -> float:
        """Forward, backward, and what ``parallel.recompute`` computes again (never the head)."""
        again = {"none": 0.0, "attention": self.attention, "full": self.layers + self.attention}
        return self.training + again[recompute]

    @property
    def training_full_attention(self) -> float:
        """Forward and backward, every pair of a row counted."""
        return 3 * (self.layers + self.attention_full + self.head)


def model_flops_per_step(
    model: ModelConfig, objective: ObjectiveConfig, *, sequence_length: int, rows: int
) -> Flops:
    """Return the operations of one step on ``rows`` data rows.

    Args:
        model: shape.
        objective: decides stack rows, pairs of attention and entries with loss.
        sequence_length: tokens of a row.
        rows: data rows of the global batch.
    """
    per_row = shares(objective, sequence_length)
    tokens = rows * sequence_length
    width = head_size(model) * model.num_heads
    stack_tokens = per_row.stack_rows * tokens
    full = 4.0 * width * sequence_length * stack_tokens * model.num_layers
    return Flops(
        layers=2.0 * matrix_parameters_per_layer(model) * model.num_layers * stack_tokens,
        attention=full * per_row.computed_pairs,
        attention_full=full * per_row.key_rows,
        head=2.0 * model.hidden_size * model.vocab_size * per_row.head_rows * tokens,
    )


def matrix_parameters_per_layer(model: ModelConfig) -> int:
    """Return the weights of one layer's matrices."""
    hidden, size = model.hidden_size, head_size(model)
    attention = hidden * size * (2 * model.num_heads + 2 * num_kv_heads(model))
    matrices = 3 if model.activation == "swiglu" else 2
    return attention + matrices * hidden * ffn_size(model)


@dataclass(frozen=True)
class Shares:
    """What an objective makes of a data row."""

    stack_rows: float
    """Rows through the stack: 1, 1.5 for a mixed Eso-LM, 2 for two-stream passes."""
    head_rows: float
    """Entries with loss per token of the data row."""
    computed_pairs: float
    """Attention pairs that are computed, as a share of the L^2 of a stack row."""
    key_rows: float
    """Rows of keys per row of queries."""


def shares(objective: ObjectiveConfig, length: int) -> Shares:
    """Return the shares of an objective on rows of ``length`` tokens.

    A block-diffusion copy is given its true row and itself: three rows of keys for two of queries.
    """
    causal = (length + 1) / (2 * length)
    if objective.name == "ar":
        return Shares(1.0, 1.0, causal, 1.0)
    if objective.name == "mdlm":
        return Shares(1.0, 0.5, 1.0, 1.0)
    if objective.name == "bd3lm":
        return Shares(2.0, 0.5, 0.5 * (1 + objective.block_size / length), 1.5)
    kappa = diffusion_fraction(objective)
    head = kappa * (1 - objective.alpha_0 / 2) + (1 - kappa) * (1 - objective.alpha_0)
    return Shares(2.0 - kappa, head, causal, 1.0)
