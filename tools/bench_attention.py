"""Backward pass of causal attention on this CPU in bf16, by PyTorch's kernel in bf16 and in float32.

    python -m tools.bench_attention

One thread, four heads, about 2,048 tokens a call, laid out as in training; conversions to float32 and
back count. The two are timed in turn, and the shortest of each counts. It decides from which size on the
kernel runs in bf16 (``_SMALL`` in model/attention/kernels.py).
"""

import argparse
from functools import partial

import torch

from megatron_eso.model.attention import kernels
from tools.turns import shortest_in_turn

HEADS, TOKENS, ROUNDS = 4, 2048, 15
LENGTHS, HEAD_SIZES = (64, 128, 256, 512, 1024), (32, 64, 128)


def main() -> None:
    """Measure and print a table."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    torch.set_num_threads(1)
    print("| L | head size | L x head size | bf16, ms | in float32, ms | bf16 / float32 |")
    print("|---|---|---|---|---|---|")
    for size in HEAD_SIZES:
        for length in LENGTHS:
            in_bf16, in_float32 = (1e3 * seconds for seconds in measure(length, size))
            print(
                f"| {length} | {size} | {length * size:,} | {in_bf16:.2f} | {in_float32:.2f} "
                f"| {in_bf16 / in_float32:.2f} |",
                flush=True,
            )


def measure(length: int, size: int) -> list[float]:
    """Return the seconds of a backward call in bf16 and in float32."""
    shape = length, max(TOKENS // length, 1), HEADS, size
    query, key, value, grad = (
        torch.randn(shape).to(torch.bfloat16).permute(1, 2, 0, 3) for _ in range(4)
    )
    forward = kernels.causal_forward(query, key, value, size**-0.5)
    given = grad, query, key, value, forward.out

    def backward(dtype: torch.dtype) -> None:
        found = kernels.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(x.to(dtype) for x in given), forward.lse, 0.0, True
        )
        for x in found:
            x.to(torch.bfloat16)

    works = {str(dtype): partial(backward, dtype) for dtype in (torch.bfloat16, torch.float32)}
    shortest_in_turn(works, 1)  # the first calls also make what later ones find there
    return list(shortest_in_turn(works, ROUNDS).values())


if __name__ == "__main__":
    main()
