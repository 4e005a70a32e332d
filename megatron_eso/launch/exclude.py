"""Which bad nodes Slurm excludes from a job: as many as the job can do without.

Slurm's own list does not expire and ignores the size of the partition: a job that needs nine of ten
nodes and excludes two waits forever. So a node is excluded only while enough others are in service;
nodes that stay on the list longest go first. The rest may come back, and their health check decides.
Nodes named by the site's or the user's own ``--exclude`` stay excluded. Standard library only.
"""

from collections.abc import Collection, Mapping

from megatron_eso.errors import ClusterError
from megatron_eso.launch import slurm
from megatron_eso.launch.records import Records


def to_leave_out(
    bad: list[str], states: Mapping[str, str], *, always: Collection[str], need: int
) -> tuple[list[str], list[str]]:
    """Return the bad nodes that a job can do without, and those that it cannot.

    Args:
        bad: nodes to avoid, the worst first.
        states: state of every node of the partition.
        always: nodes that the job must never get.
        need: number of nodes of the job.
    """
    served = {n for n, s in states.items() if not slurm.is_out_of_service(s)} - set(always)
    # If too few nodes are in service, the job may be waiting for one that is down now.
    spare = len(served) - need
    out: list[str] = []
    kept: list[str] = []
    for node in bad:
        costs = int(node in served)
        if spare >= costs:
            spare -= costs
            out.append(node)
        elif node in states:
            kept.append(node)
    return out, kept


def exclusions(records: Records, *, partition: str, need: int, always: str) -> tuple[str, str]:
    """Return the value of ``--exclude`` for a run's next job (empty: none), and what to tell the user.

    Args:
        records: the run's records, with its bad nodes.
        partition: partition or partitions; empty: Slurm's default.
        need: number of nodes of the job.
        always: nodes that the job must never get, in Slurm's notation.
    """
    listed = records.bad_nodes()
    bad = sorted(listed, key=lambda node: (-listed[node]["until"], node))
    if not bad:
        return always, ""
    try:
        hidden = slurm.expand(always)
        states = slurm.node_states(partition)
        if not states:
            raise ClusterError(f"sinfo names no node of partition {partition or '(default)'}")
    except ClusterError as error:
        return _joined(
            always, bad
        ), f"all bad nodes are excluded, as nodes cannot be counted: {error}"
    out, kept = to_leave_out(bad, states, always=hidden, need=need)
    said = ""
    if kept:
        said = f"bad, but allowed, as the partition has too few others for {need} nodes: {', '.join(kept)}"
    return _joined(always, out), said


def _joined(always: str, nodes: list[str]) -> str:
    return ",".join([*([always] if always else []), *sorted(nodes)])
