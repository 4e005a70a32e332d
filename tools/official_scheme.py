"""A straightforward implementation of the official Eso-LM training scheme, only for comparison.

Plain torch: rows of [z; x], 2L long, under a dense mask; logits for every entry; the same Llama-style
shape as ours. bench.py measures our trainer against it.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from megatron_eso.config.derive import ffn_size, head_size
from megatron_eso.config.schema import ModelConfig


class Layer(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        hidden, inner = model.hidden_size, ffn_size(model)
        self.heads, self.size = model.num_heads, head_size(model)
        self.norm1, self.norm2 = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * self.heads * self.size, bias=False)
        self.out = nn.Linear(self.heads * self.size, hidden, bias=False)
        self.up = nn.Linear(hidden, 2 * inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """Return [B, n, H]."""
        rows, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(rows, length, 3, self.heads, self.size).unbind(2)
        q, k, v = (t.transpose(1, 2) for t in (_rotate(q, cos, sin), _rotate(k, cos, sin), v))
        y = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + self.out(y.transpose(1, 2).reshape(rows, length, -1))
        gate, up = self.up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(silu(gate) * up)


class OfficialScheme(nn.Module):
    """Embedding, layers, norm, and a head on all entries."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.model = model
        self.embedding = nn.Embedding(model.vocab_size, model.hidden_size)
        self.layers = nn.ModuleList([Layer(model) for _ in range(model.num_layers)])
        self.norm = nn.RMSNorm(model.hidden_size)
        self.head = nn.Linear(model.hidden_size, model.vocab_size, bias=False)

    def loss(self, tokens: Tensor, masked: Tensor, order: Tensor, *, sequential: bool) -> Tensor:
        """Return the summed loss of rows that take one pass."""
        mask_id = self.model.vocab_size - 1
        x = tokens.gather(1, order)
        z = torch.where(masked, mask_id, tokens).gather(1, order)
        has_loss = masked.gather(1, order)
        length = tokens.shape[1]
        inputs, positions, visible = z, order, None
        if sequential:
            inputs, positions = torch.cat([z, x], dim=1), torch.cat([order, order], dim=1)
            visible = _two_l_mask(length)
        hidden = self.embedding(inputs)
        half = head_size(self.model) // 2
        angles = positions[..., None] * 10000.0 ** (-torch.arange(half) / half)
        cos, sin = angles.cos().unsqueeze(2), angles.sin().unsqueeze(2)
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, visible)
        logits = self.head(self.norm(hidden))  # every entry, as the official code does
        logits = logits[..., :mask_id].log_softmax(dim=-1)[:, :length]
        nats = -logits.gather(2, x[..., None])[..., 0]
        return torch.where(has_loss, nats, 0.0).sum()


def _two_l_mask(length: int) -> Tensor:
    place = torch.arange(length)
    own = torch.eye(length, dtype=torch.bool)
    before = place[:, None] > place[None, :]
    z_rows = torch.cat([own, before], dim=1)
    x_rows = torch.cat([torch.zeros_like(own), before | own], dim=1)
    return torch.cat([z_rows, x_rows])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
