"""Element-wise functions of the layers, compiled for a GPU to kernels that read and write each number once.

PyTorch compiles a function anew for every case it meets: a shape, strides, whether a tensor requires a
gradient. After eight cases it gives up and runs the function operator by operator for good, and says so
in a warning alone. Training, evaluations and samples of one process are more cases than that (docs/LOG.md,
2026-11-27). So tensors come detached here, and sizes that change from call to call are marked as unknown,
the others (heads, head size) as they are: one kernel then serves all rows.
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
    """Return the function's result, computed by kernels for any size of some dimensions.

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
    x = x.detach()  # another object: marks stay off the caller's
    torch._dynamo.maybe_mark_dynamic(x, changing)
    return x
