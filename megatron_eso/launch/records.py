"""The files of RUN/slurm: what is submitted, and what the attempts of its job leave for each other.

Standard library only: the batch script runs this with the node's own Python.

written by submit:
    config.yaml, profile.yaml, job.sbatch, commit.txt, code/   what the job runs (of an array: one for all)
    submitting       another submit is at work
    job.json         the newest job, and how it was submitted; a chained job notes its successor
    state.json       what the decisions need of the profile; counters and the status before the attempt
by the job:
    attempts.jsonl   one line per event: begin, launching, again, end
    bad_nodes.json   node -> reason, until
    held.json        why the job was held
    health/ATTEMPT/  NODE.json: its problems; NODE.pairs.json: speeds with its neighbors
    announced/       one file per node that the cloud will take
    hosts.ATTEMPT    order of the ranks; job.sh alone writes and reads it
by cancel:
    stop             "do not requeue"
"""

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_eso.errors import ClusterError
from megatron_eso.files import append_json, read_json, read_json_lines, write_json, write_whole

_STEP = re.compile(r"step_(\d{10})")  # as checkpoint/folder.py, which job scripts do not import


class Records:
    """The files of RUN/slurm, which the first one written makes; an array's task has its own."""

    def __init__(self, run: Path) -> None:
        self.run, self.folder = run, run / "slurm"
        self.config, self.script = self.folder / "config.yaml", self.folder / "job.sbatch"
        self.code = self.folder / "code"

    @contextmanager
    def submit_lock(self) -> Iterator[None]:
        """Refuse a second submit of the same run during the block.

        Raises:
            ClusterError: if another submit is at work, or the folder cannot be written.
        """
        try:
            lock = self._to_write("submitting")
            lock.touch(exist_ok=False)
        except FileExistsError:
            raise ClusterError(
                f"another submit of {self.run} is at work; if there is none, remove "
                f"{self.folder / 'submitting'}"
            ) from None
        except OSError as error:
            raise ClusterError(f"folder={self.run} cannot be written: {error.strerror}") from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)

    def set_snapshot(
        self, *, config: str, profile: str, script: str, commit: str, package: Path
    ) -> None:
        """Replace what the job runs: the texts, and a copy of a package's folder."""
        write_whole(self._to_write(self.config.name), config)
        write_whole(self.script, script)
        shutil.rmtree(self.code, ignore_errors=True)
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(package, self.code / package.name, ignore=ignore)
        write_whole(self.folder / "commit.txt", commit)
        write_whole(self.folder / "profile.yaml", profile)

    def submission(self) -> dict:
        """Return the newest job and how it was submitted; empty if none was."""
        return read_json(self.folder / "job.json")

    def set_submission(self, *, job: str, **facts: Any) -> None:
        """Note the newest job; facts that are not given stay as they are.

        Args:
            job: its id.
            facts: ``num_tasks``: tasks of the array, 0 for a single run. The others are for a reader.
        """
        write_json(self._to_write("job.json"), {**self.submission(), "job": job, **facts})

    def ask_to_stop(self) -> None:
        """Ask the job to end instead of being requeued."""
        self._to_write("stop").touch()

    def is_stop_asked(self) -> bool:
        """Return whether the job must not be requeued."""
        return (self.folder / "stop").exists()

    def clear_stop(self) -> None:
        """Take back the wish to stop, if there is one."""
        (self.folder / "stop").unlink(missing_ok=True)

    def add_event(self, attempt: str, event: str, **facts: Any) -> None:
        """Append one line to attempts.jsonl."""
        line = {"attempt": attempt, "event": event, "time": time.time(), **facts}
        append_json(self._to_write("attempts.jsonl"), line)

    def events(self) -> list[dict]:
        """Return all events, oldest first; a line cut off by a power loss is left out."""
        return read_json_lines(self.folder / "attempts.jsonl")

    def state(self) -> dict:
        """Return the counters."""
        return read_json(self.folder / "state.json")

    def set_state(self, **changes: Any) -> None:
        """Change counters."""
        write_json(self._to_write("state.json"), {**self.state(), **changes})

    def held(self) -> dict:
        """Return which attempt held the job, and why; empty if it is not held."""
        return read_json(self.folder / "held.json")

    def set_held(self, attempt: str, why: str) -> None:
        """Note that an attempt holds the job."""
        write_json(self._to_write("held.json"), {"attempt": attempt, "why": why})

    def clear_held(self) -> None:
        """Forget that the job was held."""
        (self.folder / "held.json").unlink(missing_ok=True)

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
            write_json(self._to_write("bad_nodes.json"), {**self.bad_nodes(), **new})

    def make_health_folder(self, attempt: str) -> Path:
        """Make and return the folder in which the nodes of an attempt report their health."""
        folder = self.folder / "health" / attempt
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def problems(self, attempt: str, node: str) -> list[str] | None:
        """Return what a node reported to be wrong with it; None if it reported nothing."""
        return read_json(self.folder / f"health/{attempt}/{node}.json").get("problems")

    def set_problems(self, attempt: str, node: str, problems: list[str]) -> None:
        """Report, called on the node itself, what is wrong with it."""
        write_json(self._to_write(f"health/{attempt}/{node}.json"), {"problems": problems})

    def pair_speeds(self, attempt: str, node: str) -> dict[str, dict]:
        """Return what a node measured with its neighbors; see :func:`pairs.slow_nodes`."""
        return read_json(self.folder / f"health/{attempt}/{node}.pairs.json")

    def set_pair_speeds(self, attempt: str, node: str, speeds: dict[str, dict]) -> None:
        """Report, called on the node itself, what it has measured so far."""
        write_json(self._to_write(f"health/{attempt}/{node}.pairs.json"), speeds)

    def announce(self, node: str, why: str) -> None:
        """Record, called on the node itself, that it will go; :meth:`take_announced` reads the record."""
        write_json(self._to_write(f"announced/{node}.json"), {"node": node, "why": why})

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

    def _to_write(self, name: str) -> Path:
        """Return the path of a file that is going to be written; its folder is made."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def checkpoint_step(run: Path) -> int:
    """Return the step of a run's newest committed checkpoint; -1 if there is none."""
    marked = (run / "checkpoints").glob("step_*/COMMITTED")
    names = (_STEP.fullmatch(path.parent.name) for path in marked)  # copies may have other names
    return max((int(name.group(1)) for name in names if name), default=-1)


def tasks_of(run: Path) -> list[Path]:
    """Return the folders of the tasks of a run's array, by task number; empty for a single run."""
    return [run / str(task) for task in range(Records(run).submission().get("num_tasks", 0))]
