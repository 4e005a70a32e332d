"""What a job leaves in RUN/slurm: attempts, bad nodes, the count of attempts without progress.

Standard library only: the batch script runs this with the node's own Python.

attempts.jsonl   one line per event: begin, launching, again, end
bad_nodes.json   node -> reason, until
state.json       counters and the status before the attempt    stop             "do not requeue"
held.json        why the job was held                          health/ATTEMPT/  one file per node
announced/       one file per node that the cloud will take
"""

import json
import re
import time
from pathlib import Path
from typing import Any

from megatron_eso.files import parse_json, read_json, write_json

_STEP = re.compile(r"step_(\d{10})")  # as checkpoint/folder.py, which job scripts do not import


class Records:
    """The files of RUN/slurm, a folder that is made unless someone only looks on."""

    def __init__(self, run: Path, *, is_onlooker: bool = False) -> None:
        self.run, self.folder = run, run / "slurm"
        if not is_onlooker:
            self.folder.mkdir(parents=True, exist_ok=True)

    def add_event(self, attempt: str, event: str, **facts: Any) -> None:
        """Append one line to attempts.jsonl."""
        line = {"attempt": attempt, "event": event, "time": time.time(), **facts}
        with open(self.folder / "attempts.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def events(self) -> list[dict]:
        """Return all events, oldest first; a line cut off by a power loss is left out."""
        try:
            lines = (self.folder / "attempts.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [event for line in lines if (event := parse_json(line))]

    def state(self) -> dict:
        """Return the counters."""
        return read_json(self.folder / "state.json")

    def set_state(self, **changes: Any) -> None:
        """Change counters."""
        write_json(self.folder / "state.json", {**self.state(), **changes})

    def bad_nodes(self, now: float | None = None) -> dict[str, dict]:
        """Return the nodes to avoid: name -> {reason, until}; expired ones are left out."""
        now = time.time() if now is None else now
        found = read_json(self.folder / "bad_nodes.json")
        return {node: entry for node, entry in found.items() if entry.get("until", 0) > now}

    def add_bad_nodes(self, reasons: dict[str, str], hours: float) -> None:
        """Put nodes on the list of bad nodes for some hours."""
        until = time.time() + hours * 3600
        new = {node: {"reason": reason, "until": until} for node, reason in reasons.items()}
        if new:
            write_json(self.folder / "bad_nodes.json", {**self.bad_nodes(), **new})

    def announce(self, node: str, why: str) -> None:
        """Record, called on the node itself, that it will go; :meth:`take_announced` reads the record."""
        folder = self.folder / "announced"
        folder.mkdir(exist_ok=True)
        write_json(folder / f"{node}.json", {"node": node, "why": why})

    def take_announced(self) -> list[tuple[str, str]]:
        """Return and forget the nodes announced to go since the last call, each with the reason."""
        found = []
        for path in sorted((self.folder / "announced").glob("*.json")):
            entry = read_json(path)
            path.unlink()
            if "node" in entry:
                found.append((str(entry["node"]), str(entry.get("why", ""))))
        return found

    def status(self) -> dict:
        """Return the trainer's status.json; empty if there is none."""
        return read_json(self.run / "status.json")

    def checkpoint_step(self) -> int:
        """See :func:`checkpoint_step`."""
        return checkpoint_step(self.run)


def checkpoint_step(run: Path) -> int:
    """Return the step of a run's newest committed checkpoint; -1 if there is none."""
    marked = (run / "checkpoints").glob("step_*/COMMITTED")
    names = (_STEP.fullmatch(path.parent.name) for path in marked)  # copies may have other names
    return max((int(name.group(1)) for name in names if name), default=-1)


def tasks_of(run: Path) -> list[Path]:
    """Return the folders of an array's tasks in its run folder, by task number; empty for a single run."""
    found = [path.parent for path in run.glob("*/slurm") if path.parent.name.isdigit()]
    return sorted(found, key=lambda path: int(path.name))
