"""How many weights a model has, whole and per pipeline stage; torch-free."""

from megatron_eso.config.derive import ffn_size, head_size, num_kv_heads, padded_vocab_size
from megatron_eso.config.schema import ModelConfig, RunConfig
from megatron_eso.plan.flops import matrix_parameters_per_layer


def num_parameters(model: ModelConfig, *, padded: bool = False) -> int:
    """Return the number of weights, norms and biases included.

    Args:
        model: shape.
        padded: count the padded vocabulary rows, as stored, instead of the real ones.
    """
    return (
        model.num_layers * layer_parameters(model)
        + embedding_parameters(model, padded=padded)
        + head_parameters(model, padded=padded)
    )


def checkpoint_bytes(config: RunConfig) -> int:
    """Return the bytes of a checkpoint: float32 masters, two moments and, if kept, the average."""
    kinds = 4 if config.optimizer.ema_decay else 3
    return 4 * kinds * num_parameters(config.model, padded=True)


def layer_parameters(model: ModelConfig) -> int:
    """Return the weights of one layer."""
    return matrix_parameters_per_layer(model) + layer_vectors(model)


def layer_vectors(model: ModelConfig) -> int:
    """Return the weights of one layer outside its matrices: norms and biases."""
    size, hidden = head_size(model), model.hidden_size
    count = 2 * _norm_parameters(model, hidden)
    if model.attention_bias:
        count += size * (model.num_heads + 2 * num_kv_heads(model)) + hidden
    if model.mlp_bias:
        count += ffn_size(model) * (2 if model.activation == "swiglu" else 1) + hidden
    if model.qk_norm:
        count += 2 * _norm_parameters(model, size)
    return count


def embedding_parameters(model: ModelConfig, *, padded: bool = True) -> int:
    """Return the weights of the token embedding."""
    return model.hidden_size * _vocabulary(model, padded)


def head_parameters(model: ModelConfig, *, padded: bool = True) -> int:
    """Return the weights after the last layer: the final norm and the head, if it has its own."""
    vocabulary = _vocabulary(model, padded)
    count = _norm_parameters(model, model.hidden_size)
    if not model.tie_embeddings:
        count += model.hidden_size * vocabulary
    return count + (vocabulary if model.head_bias else 0)


def _vocabulary(model: ModelConfig, padded: bool) -> int:
    return padded_vocab_size(model) if padded else model.vocab_size


def _norm_parameters(model: ModelConfig, width: int) -> int:
    return width * (2 if model.norm == "layernorm" else 1)
