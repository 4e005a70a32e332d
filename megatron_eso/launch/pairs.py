"""Which node is slow, judged from all-reduces between pairs of neighbors in a ring.

A slow node is slow with both neighbors; a node that is slow with only one has a slow neighbor.
parallel/pair_bandwidth.py measures on every node; the batch script's helper judges with this module.
"""

from collections.abc import Mapping, Sequence


def rounds(num_nodes: int) -> list[list[tuple[int, int]]]:
    """Return the pairs of neighbors in a ring, in rounds in which no node is in two pairs."""
    ring = [(i, (i + 1) % num_nodes) for i in range(num_nodes if num_nodes > 2 else num_nodes - 1)]
    whole = num_nodes - num_nodes % 2
    found = [ring[0:whole:2], ring[1:whole:2], ring[whole:]]
    return [pairs for pairs in found if pairs]


def slow_nodes(
    reports: Mapping[str, Mapping[str, dict]], nodes: Sequence[str], minimum: float
) -> dict[str, str]:
    """Return the nodes that are slow with every neighbor, and why.

    Args:
        reports: node -> neighbor -> {"gb_per_second": speed} or {"error": text}, as each node wrote it,
            in the ring's order. A node that wrote nothing counts as slow with every neighbor.
        nodes: nodes to judge; pairs with other nodes are left out.
        minimum: speed in GB/s below which a pair is slow.
    """
    seen: dict[str, list[tuple[bool, str]]] = {node: [] for node in nodes}
    order = [*reports, *(node for node in nodes if node not in reports)]
    for one, other in {(a, b) for pairs in rounds(len(order)) for a, b in _named(pairs, order)}:
        if one not in seen or other not in seen:
            continue
        both = [reports.get(a, {}).get(b) for a, b in ((one, other), (other, one))]
        speeds = [r["gb_per_second"] for r in both if r and "gb_per_second" in r]
        errors = [r["error"] for r in both if r and "error" in r]
        if len(speeds) == 2:
            is_slow, text = min(speeds) < minimum, f"{min(speeds):.3g} GB/s"
        else:
            is_slow, text = True, errors[0] if errors else "no answer"
        seen[one].append((is_slow, f"{text} with {other}"))
        seen[other].append((is_slow, f"{text} with {one}"))
    return {
        node: f"all-reduce below {minimum:g} GB/s: {', '.join(text for _, text in found)}"
        for node, found in seen.items()
        if found and all(is_slow for is_slow, _ in found)
    }


def _named(pairs: list[tuple[int, int]], order: Sequence[str]) -> list[tuple[str, str]]:
    return [(order[a], order[b]) for a, b in pairs]
