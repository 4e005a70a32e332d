"""Timing of functions that are compared."""

import time
from collections.abc import Callable, Mapping


def shortest_in_turn(
    works: Mapping[str, Callable[[], None]],
    num_rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Return the shortest time of each function, in the clock's seconds; the functions take turns."""
    shortest = dict.fromkeys(works, float("inf"))
    for _ in range(num_rounds):
        for name, work in works.items():
            begin = clock()
            work()
            shortest[name] = min(shortest[name], clock() - begin)
    return shortest
