"""The ledger of a run: RUN/events.jsonl, one line per event, append-only.

The launcher and rank 0 write it; `megatron-eso goodput` reads it (launch/ledger.py). Every line holds
the wall clock, the machine's monotonic clock and the boot it belongs to, so clock jumps are noticed.
"""

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

EVENTS = "events.jsonl"
log = logging.getLogger(__name__)


def record(run: Path, event: str, **facts: Any) -> None:
    """Append one event; a folder that cannot be written causes a warning and never ends a run."""
    line = {
        "event": event,
        "time": time.time(),
        "clock": time.monotonic(),
        "boot": _boot(),
        "pid": os.getpid(),
        **facts,
    }
    try:
        run.mkdir(parents=True, exist_ok=True)
        # Each line is a single write, so processes that append at the same time do not mix their lines.
        descriptor = os.open(run / EVENTS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            text = missing_newline(run / EVENTS) + json.dumps(line) + "\n"
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        log.warning("event %s could not be written to %s: %s", event, run / EVENTS, error)


def missing_newline(path: Path) -> str:
    """Return the newline to write first if a crash cut the last line off, else an empty string."""
    with open(path, "rb") as file:
        if not file.seek(0, os.SEEK_END):
            return ""
        file.seek(-1, os.SEEK_END)
        return "" if file.read(1) == b"\n" else "\n"


def read_events(run: Path) -> list[dict[str, Any]]:
    """Return all events in the order written; a line cut off by a crash is left out."""
    try:
        lines = (run / EVENTS).read_text(errors="replace").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event and "time" in event:
            events.append(event)
    return events


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:
        return ""
