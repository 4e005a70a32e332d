"""An independent Eso-LM forward pass: plain torch, one row, explicit masks, weights by name.

It shares no code with the package and computes in float64. Letters: n = input entries, d = head size.
"""

import numpy as np
import torch

EPS = 1e-5


class ReferenceModel:
    """Llama-style transformer over entries with explicit positions and visibility."""

    def __init__(
        self, weights: dict[str, np.ndarray], *, heads: int, groups: int, vocab: int
    ) -> None:
        self.weights = {name: torch.from_numpy(value).double() for name, value in weights.items()}
        self.heads, self.groups, self.vocab = heads, groups, vocab
        prefix = "decoder.layers.mlp.linear_fc2.weight["
        self.num_layers = sum(name.startswith(prefix) for name in weights)

    def log_probs(self, tokens, positions, visible):
        """Return [n, vocab - 1] log-probabilities of the real tokens.

        Args:
            tokens: [n] input ids.
            positions: [n] rotary positions.
            visible: [n, n] True where entry i may look at entry j.
        """
        hidden = self.weights["embedding.word_embeddings.weight"][tokens]
        for layer in range(self.num_layers):
            hidden = hidden + self._attention(hidden, positions, visible, layer)
            hidden = hidden + self._mlp(hidden, layer)
        hidden = self._norm(hidden, self.weights["decoder.final_layernorm.weight"])
        logits = hidden @ self.weights["output_layer.weight"].T
        return torch.log_softmax(logits[:, : self.vocab - 1], dim=1)

    def _get(self, name, layer):
        return self.weights[f"decoder.layers.{name}[{layer}]"]

    def _norm(self, x, weight):
        return x / (x.pow(2).mean(dim=1, keepdim=True) + EPS).sqrt() * weight

    def _attention(self, hidden, positions, visible, layer):
        x = self._norm(hidden, self._get("self_attention.linear_qkv.layer_norm_weight", layer))
        qkv = x @ self._get("self_attention.linear_qkv.weight", layer).T
        per_group = self.heads // self.groups
        size = qkv.shape[1] // (self.heads + 2 * self.groups)
        qkv = qkv.view(len(hidden), self.groups, per_group + 2, size)
        outputs = []
        for head in range(self.heads):
            group = head // per_group
            q = self._rotate(qkv[:, group, head % per_group], positions)
            k = self._rotate(qkv[:, group, per_group], positions)
            scores = (q @ k.T) / size**0.5
            weights = torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=1)
            outputs.append(weights @ qkv[:, group, per_group + 1])
        return torch.cat(outputs, dim=1) @ self._get("self_attention.linear_proj.weight", layer).T

    def _rotate(self, x, positions):
        half = x.shape[1] // 2
        frequency = 10000.0 ** (-torch.arange(half).double() / half)
        angle = positions[:, None].double() * frequency
        first, second = x[:, :half], x[:, half:]
        return torch.cat(
            [
                first * angle.cos() - second * angle.sin(),
                second * angle.cos() + first * angle.sin(),
            ],
            dim=1,
        )

    def _mlp(self, hidden, layer):
        x = self._norm(hidden, self._get("mlp.linear_fc1.layer_norm_weight", layer))
        gate, up = (x @ self._get("mlp.linear_fc1.weight", layer).T).chunk(2, dim=1)
        return (torch.nn.functional.silu(gate) * up) @ self._get("mlp.linear_fc2.weight", layer).T


def diffusion_pass(model, tokens, masked, order, mask_id):
    """Return log-probabilities [L, V - 1] in order: causal over [clean; masked], masks in place."""
    inputs = torch.where(masked, mask_id, tokens)[order]
    length = len(tokens)
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    return model.log_probs(inputs, order, visible)


def sequential_pass(model, tokens, masked, order, mask_id):
    """Return log-probabilities [L, V - 1] of the z half of the official 2L concatenation."""
    length = len(tokens)
    x = tokens[order]
    z = torch.where(masked, mask_id, tokens)[order]
    place = torch.arange(length)
    own = torch.eye(length, dtype=torch.bool)
    z_rows = torch.cat([own, place[:, None] > place[None, :]], dim=1)
    x_rows = torch.cat([torch.zeros_like(own), place[:, None] >= place[None, :]], dim=1)
    both = torch.cat([order, order])
    return model.log_probs(torch.cat([z, x]), both, torch.cat([z_rows, x_rows]))[:length]
