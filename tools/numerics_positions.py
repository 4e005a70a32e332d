"""Is it the rotary positions that bring AR below nanoGPT's 1.88 on tiny Shakespeare?

A plain PyTorch GPT of the public recipe (4 layers, 4 heads, 128 wide, L = 64, batch 12, 2000 steps,
LayerNorm without bias, GELU, tied head), none of the project's code, trained with learned
and with rotary positions; everything else, seeds and crops included, is the same.

    python -m tools.numerics_positions --text tinyshakespeare.txt --seeds 3
"""

import argparse
import math

import torch
from torch import Tensor, nn

from tools.arguments import at_least_1, text_file

WIDTH, LAYERS, HEADS, LENGTH, BATCH, STEPS = 128, 4, 4, 64, 12, 2000
WARMUP, PEAK, LOWEST = 100, 1e-3, 1e-4
EVALUATION_ROWS = 240  # nanoGPT: 20 batches of 12 random crops


class Block(nn.Module):
    """Attention and MLP, pre-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = (nn.LayerNorm(WIDTH, bias=False) for _ in range(2))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, angles: Tensor | None) -> Tensor:
        """Return [B, L, WIDTH]; ``angles`` [L, head / 2] turns queries and keys."""
        b, length, _ = x.shape
        shape = (b, length, HEADS, WIDTH // HEADS)
        q, k, v = (t.view(shape).transpose(1, 2) for t in self.qkv(self.norm_1(x)).chunk(3, -1))
        if angles is not None:
            q, k = _turn(q, angles), _turn(k, angles)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, length, WIDTH))
        return x + self.down(nn.functional.gelu(self.up(self.norm_2(x))))


def _turn(x: Tensor, angles: Tensor) -> Tensor:
    one, other = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([one * cos - other * sin, other * cos + one * sin], -1)


class Model(nn.Module):
    """The recipe's GPT."""

    def __init__(self, vocab_size: int, positions: str) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, WIDTH)
        self.places = nn.Embedding(LENGTH, WIDTH) if positions == "learned" else None
        self.blocks = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        size = WIDTH // HEADS
        rates = 10000.0 ** -(torch.arange(0, size, 2) / size)
        self.register_buffer("angles", torch.arange(LENGTH)[:, None] * rates)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                deep = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / (math.sqrt(2 * LAYERS) if deep else 1.0))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [B, L, V]."""
        x = self.tokens(tokens)
        if self.places is not None:
            x = x + self.places.weight
        for block in self.blocks:
            x = block(x, self.angles if self.places is None else None)
        return self.norm(x) @ self.tokens.weight.T


def train(data: Tensor, seed: int, positions: str) -> tuple[float, float]:
    """Return held-out nats per character on nanoGPT's random crops, and on all adjacent crops."""
    torch.manual_seed(seed)
    cut = int(0.9 * len(data))
    training, held_out = data[:cut], data[cut:]
    model = Model(int(data.max()) + 1, positions)
    groups = [
        {"params": [w for w in model.parameters() if w.dim() == 2], "weight_decay": 0.1},
        {"params": [w for w in model.parameters() if w.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.99))
    crops = torch.Generator().manual_seed(seed)  # the same crops for both kinds of positions
    for step in range(STEPS):
        share = max(0.0, (step - WARMUP) / (STEPS - WARMUP))
        rate = LOWEST + 0.5 * (1 + math.cos(math.pi * share)) * (PEAK - LOWEST)
        for group in optimizer.param_groups:
            group["lr"] = min(rate, PEAK * (step + 1) / (WARMUP + 1))
        loss = _loss(model, _random_crops(training, BATCH, crops))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        random = _loss(model, _random_crops(held_out, EVALUATION_ROWS, crops))
        every = held_out.unfold(0, LENGTH + 1, LENGTH)
        return random.item(), _loss(model, every).item()


def _random_crops(data: Tensor, number: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(data) - LENGTH, (number, 1), generator=generator)
    return data[starts + torch.arange(LENGTH + 1)]


def _loss(model: Model, rows: Tensor) -> Tensor:
    logits = model(rows[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def main() -> None:
    """Train both kinds for every seed and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=text_file, required=True, help="tinyshakespeare.txt")
    parser.add_argument("--seeds", type=at_least_1, default=3, help="seeds per kind [3]")
    arguments = parser.parse_args()
    text = arguments.text.read_text()
    known = {character: number for number, character in enumerate(sorted(set(text)))}
    data = torch.tensor([known[character] for character in text])
    print("positions  seed  random crops  every crop")
    for positions in ("learned", "rotary"):
        for seed in range(arguments.seeds):
            random, every = train(data, seed, positions)
            print(f"{positions:9}  {seed:4}  {random:12.3f}  {every:10.3f}", flush=True)


if __name__ == "__main__":
    main()
