"""Replace functions with stand-ins for a while."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock


@contextlib.contextmanager
def replaced(stand_ins: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Replace each (module or class, name) with its stand-in within the block."""
    with contextlib.ExitStack() as stack:
        for where, name, stand_in in stand_ins:
            stack.enter_context(mock.patch.object(where, name, stand_in))
        yield
