"""Element-wise functions of the layers, compiled for a GPU to kernels that read and write each number once.

PyTorch compiles a function anew for every case it meets: a shape, strides, whether a tensor requires a
gradient. After eight cases it gives up: from then on it runs the function operator by operator, and only a
warning says so. Training, evaluation and sampling in one process have more cases than that (docs/LOG.md,
2026-11-27). So tensors are detached here, and sizes that change from call to call are marked as unknown;
the others (heads, head size) stay as they are. One kernel then serves all rows.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


def is_compiled(x: Tensor) -> bool:
    """Return whether functions of this tensor run compiled."""
    return x.is_cuda


def run_compiled(function: Callable[..., Any], *arguments: Any, changing: tuple[int, ...]) -> Any:
    """Return the function's result, from kernels compiled for any size of some dimensions.

    Args:
        function: of tensors and numbers; no gradient flows through it.
        arguments: its arguments.
        changing: dimensions of every tensor whose size changes from call to call.
    """
    return _compiled(function)(
        *(_as_one_case(x, changing) if isinstance(x, Tensor) else x for x in arguments)
    )


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def _as_one_case(x: Tensor, changing: tuple[int, ...]) -> Tensor:
    x = x.detach()  # a new object, so that the caller's tensor gets no marks
    torch._dynamo.maybe_mark_dynamic(x, changing)
    return x
