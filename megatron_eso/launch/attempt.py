"""The decisions of a job, called by the batch script: ``python -m megatron_eso.launch.attempt VERB``.

begin    is there anything to do? take the lease, note nodes that went down    -> go | done
choose   which healthy nodes train                       -> run NODES | requeue NODES | hold NODES
unfit    this node cannot serve the job, and why         -> requeue NODES | hold NODES
launching, chained   notes
end      what now?                       -> done | leave | again | requeue [NODES] | hold [NODES]

Answers go to stdout, explanations to stderr, that is to the job's log. Standard library only.
"""

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_eso.launch import lease
from megatron_eso.launch.events import read_events
from megatron_eso.launch.exclude import exclusions
from megatron_eso.launch.pairs import slow_nodes
from megatron_eso.launch.records import Records
from megatron_eso.launch.slurm import is_out_of_service

# slurm-gcp's words for a spot machine that was taken back. Such a node boots again; it is not sick.
_BLAMELESS = "Preempted instance"
_MAINTENANCE_HOURS = 2.0
"""How long to avoid a node with announced maintenance; the notice comes an hour before."""
_SILENT = "gave no answer to the health check"


@dataclass(frozen=True)
class Ending:
    """How an attempt ended."""

    status: dict
    """status.json if this attempt wrote it, else empty."""
    has_progress: bool
    """A newer checkpoint than at the attempt's start is committed."""
    is_term: bool
    """Slurm sent TERM to the batch script."""
    is_usr1: bool
    """The walltime signal came, or the same signal from `cancel --after-checkpoint`."""
    is_stop_asked: bool
    """The user asked for no further attempt."""
    num_without_progress: int
    """Attempts in a row without progress before this one."""
    has_failed_rank: bool = False
    """srun's exit code was not 0: a rank failed, and srun sent TERM to the others, which saved."""


def decide(ending: Ending, max_attempts: int) -> tuple[str, int, str]:
    """Return what to do, the new count of attempts without progress, and why.

    Only whether srun's exit code is 0 matters: it is the largest of the ranks' codes, and 143 hides the
    first failure. If a rank failed, the TERM that the others report came from srun, not from preemption.
    """
    state = ending.status.get("state", "")
    count = 0 if ending.has_progress else ending.num_without_progress
    if state == "finished":
        return "done", 0, "the run has finished"
    if ending.is_term:
        return (
            "leave",
            count,
            "Slurm ended the job (cancelled, preempted, time limit or node failure)",
        )
    if ending.is_stop_asked:
        return "done", count, "stopped as asked by `megatron-eso cancel`"
    is_preempted = state == "stopped" and not ending.is_usr1 and not ending.has_failed_rank
    if not ending.has_progress and not is_preempted:
        count += 1
    why = _reason(ending, state)
    if count >= max_attempts:
        return "hold", count, f"{count} attempts in a row without a new checkpoint; the last: {why}"
    return "requeue", count, why


def is_fault(ending: Ending) -> bool:
    """Return whether ranks failed by themselves, not because a limit or a preemption stopped them."""
    if ending.is_usr1 or ending.is_term or ending.is_stop_asked:
        return False
    return ending.has_failed_rank and ending.status.get("state") != "failed"


def _reason(ending: Ending, state: str) -> str:
    if state == "stopped" and ending.has_failed_rank:
        return "a rank failed and srun stopped the others; the job's log names it"
    if state == "stopped":
        return f"stopped by {ending.status.get('reason') or 'a signal'} with a checkpoint"
    if state == "failed":
        return f"training failed: {ending.status.get('reason', 'no reason given')}"
    if ending.is_usr1:
        return "the walltime signal came before the ranks could save"
    return "the ranks ended without a word (crash, out of memory, or a lost node)"


def begin(records: Records, attempt: str, nodes: list[str], started: float | None = None) -> str:
    """Return ``go``, or ``done`` if nothing is left to do; see the module docstring."""
    status, asked_steps = records.status(), records.state().get("total_steps", 0)
    if status.get("state") == "finished" and status.get("total_steps", 0) >= asked_steps:
        print("the run has finished already", file=sys.stderr)
        return "done"
    if records.is_stop_asked():  # the node was lost before it saved the checkpoint
        print("stopped as asked by `megatron-eso cancel`", file=sys.stderr)
        return "done"
    lease.acquire(records.run / "checkpoints", attempt)
    records.clear_held()
    before = [e for e in records.events() if e["event"] == "begin"]
    open_nodes = set(before[-1]["nodes"]) if before and not _has_ended(records) else set()
    lost = {n: why for n, why in node_troubles().items() if n in open_nodes}
    _avoid(records, lost)
    step = records.checkpoint_step()
    records.set_state(status_before=status.get("updated"), step_before=step)
    records.add_event(attempt, "begin", nodes=nodes, step=step, started=started)
    return "go"


def choose(
    records: Records,
    attempt: str,
    nodes: list[str],
    need: int,
    checked: bool,
    min_gb_per_second: float = 0.0,
) -> str:
    """Return ``run`` with the nodes that train, in Slurm's order, or what to do if too few are healthy."""
    sick = _sick(records, attempt, nodes, min_gb_per_second) if checked else {}
    if len(nodes) > 1 and all(sick.get(node) == _SILENT for node in nodes):
        # The cause is not the nodes but srun or the check's Python. Excluding all nodes would leave none.
        why = "the health check ran on no node; srun says why above"
        return _give_up_nodes(records, attempt, why)
    _avoid(records, sick)
    listed = records.bad_nodes()
    # Listed nodes that pass the check today are a last resort; they are better than waiting.
    good = [n for n in nodes if n not in listed] + [
        n for n in nodes if n in listed and n not in sick
    ]
    if len(good) >= need:
        taken = set(good[:need])
        return "run " + ",".join(n for n in nodes if n in taken)
    why = f"{len(good)} of {len(nodes)} nodes are healthy, {need} are needed"
    reasons = "; ".join(f"{node}: {reason}" for node, reason in sick.items())
    return _give_up_nodes(records, attempt, f"{why} ({reasons})" if reasons else why)


def unfit(records: Records, attempt: str, node: str, why: str) -> str:
    """Return what to do if a node cannot run the batch script or a rank."""
    _avoid(records, {node: why})
    return _give_up_nodes(records, attempt, f"{node}: {why}")


def _avoid(records: Records, bad: dict[str, str]) -> None:
    """Put nodes on the run's list of bad nodes, and print why."""
    for node, why in bad.items():
        print(f"bad node {node}: {why}", file=sys.stderr)
    records.add_bad_nodes(bad, records.state().get("bad_node_hours", 24.0))


def _and_exclude(records: Records, verb: str) -> str:
    """Return the decision followed by the nodes that Slurm must exclude."""
    nodes, said = exclusions(
        records,
        partition=os.environ.get("SLURM_JOB_PARTITION", ""),
        need=int(os.environ.get("SLURM_JOB_NUM_NODES", 1)),
        always=records.state().get("exclude", ""),
    )
    if said:
        print(said, file=sys.stderr)
    return f"{verb} {nodes}".strip()


def _give_up_nodes(records: Records, attempt: str, why: str) -> str:
    """Count an attempt without progress; return ``requeue NODES``, or ``hold NODES`` after too many."""
    state = records.state()
    count = state.get("without_progress", 0) + 1
    records.set_state(without_progress=count)
    verb = "hold" if count >= state.get("max_attempts", 3) else "requeue"
    _note(records, attempt, verb, why)
    return _and_exclude(records, verb)


def _sick(records: Records, attempt: str, nodes: list[str], minimum: float) -> dict[str, str]:
    """Return the nodes that failed a check, and why."""
    sick: dict[str, str] = {}
    for node in nodes:
        problems = records.problems(attempt, node)
        if problems is None:
            sick[node] = _SILENT
        elif problems:
            sick[node] = "; ".join(problems)
    if minimum and len(nodes) > 1:
        speeds = {node: records.pair_speeds(attempt, node) for node in nodes}
        sick |= slow_nodes(speeds, [node for node in nodes if node not in sick], minimum)
    return sick


def end(records: Records, attempt: str, options: argparse.Namespace) -> str:
    """Return what the batch script must do now."""
    held = lease.read(records.run / "checkpoints")
    if held and held["owner"] != attempt:
        # This attempt's node was cut off, and Slurm started the job elsewhere. A requeue from here
        # would end the new attempt, and the records now belong to that attempt.
        print(f"leave: a newer attempt, {held['owner']}, is at work", file=sys.stderr)
        return "leave"
    state, status = records.state(), records.status()
    nodes = options.nodes.split(",")
    troubles = {n: w for n, w in node_troubles().items() if n in nodes}
    troubles |= suspects(read_events(records.run), attempt)
    records.add_bad_nodes(troubles, options.bad_node_hours)
    for node, why in records.take_announced():
        records.add_bad_nodes({node: why}, _MAINTENANCE_HOURS)
    ending = Ending(
        status=status if status.get("updated") != state.get("status_before") else {},
        has_progress=records.checkpoint_step() > state.get("step_before", -1),
        is_term=bool(options.term),
        is_usr1=bool(options.usr1),
        is_stop_asked=records.is_stop_asked(),
        num_without_progress=state.get("without_progress", 0),
        has_failed_rank=options.code != 0,
    )
    verb, count, why = decide(ending, options.max_attempts)
    if verb == "requeue" and options.in_job_left > 0 and is_fault(ending):
        # The nodes are still ours: start the ranks again on the healthy ones.
        step, updated = records.checkpoint_step(), status.get("updated")
        records.set_state(without_progress=count, step_before=step, status_before=updated)
        records.add_event(attempt, "again", why=why, step=step, code=options.code)
        print(f"again, in this job: {why}", file=sys.stderr)
        return "again"
    records.set_state(without_progress=count)
    _note(records, attempt, verb, why, code=options.code)
    if verb in ("done", "hold"):
        lease.release(records.run / "checkpoints", attempt)
    return _and_exclude(records, verb) if verb in ("requeue", "hold") else verb


def suspects(events: list[dict], attempt: str) -> dict[str, str]:
    """Return the node whose rank failed first in every start of an attempt, if there were several starts.

    Such a node passes its check and fails under load. The first failure is that of a killed rank, or else
    the one recorded first: the other ranks fail because they lose that rank. A hang blames no node.
    """
    starts: dict[str, list[dict]] = {}
    for event in events:
        if event["event"] == "fault" and event.get("attempt") == attempt:
            starts.setdefault(event.get("start", ""), []).append(event)
    first = [min(faults, key=lambda f: f.get("cause") != "killed") for faults in starts.values()]
    nodes = {fault.get("node", "") for fault in first}
    if len(first) < 2 or len(nodes) != 1 or any(f.get("cause") == "hang" for f in first):
        return {}
    return {node: f"its rank was the first to fail, {len(first)} times in a row" for node in nodes}


def node_troubles() -> dict[str, str]:
    """Return the nodes that Slurm reports as out of service, with its reason.

    Spot machines that were taken back do not count: otherwise a run would exclude all its nodes in a day.
    """
    done = subprocess.run(["sinfo", "-hN", "-o", "%N|%T|%E"], capture_output=True, text=True)
    found = {}
    for line in done.stdout.splitlines():
        node, state, reason = line.split("|", 2)
        if is_out_of_service(state) and _BLAMELESS not in reason:
            found[node] = f"Slurm says {state} ({reason})"
    return found


def _has_ended(records: Records) -> bool:
    events = [e["event"] for e in records.events() if e["event"] in ("begin", "end")]
    return bool(events) and events[-1] == "end"


def _note(records: Records, attempt: str, verb: str, why: str, **facts: object) -> None:
    print(f"{verb}: {why}", file=sys.stderr)
    records.add_event(
        attempt, "end", decision=verb, why=why, step=records.checkpoint_step(), **facts
    )
    if verb == "hold":
        records.set_held(attempt, why)


def main() -> None:
    """Run the verb given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("verb", choices=("begin", "choose", "unfit", "launching", "chained", "end"))
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--attempt", required=True)
    parser.add_argument("--nodes", default="")
    parser.add_argument("--job", default="")
    parser.add_argument("--why", default="")
    for name in ("need", "checked", "code", "term", "usr1", "max-attempts",
                 "in-job-left"):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--min-gb-per-second", type=float, default=0.0)
    parser.add_argument("--started", type=float, help="time of the job script's first line")
    parser.add_argument("--bad-node-hours", type=float, default=24.0)
    options = parser.parse_args()
    records, nodes = Records(options.run), options.nodes.split(",")
    if options.verb == "begin":
        print(begin(records, options.attempt, nodes, options.started))
    elif options.verb == "choose":
        print(choose(records, options.attempt, nodes, options.need, bool(options.checked),
                     options.min_gb_per_second))  # fmt: skip
    elif options.verb == "unfit":
        print(unfit(records, options.attempt, options.nodes, options.why))
    elif options.verb == "launching":
        records.add_event(options.attempt, "launching", nodes=nodes)
    elif options.verb == "chained":
        records.set_submission(job=options.job)
    else:
        print(end(records, options.attempt, options))


if __name__ == "__main__":
    main()
