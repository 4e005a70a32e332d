"""The ledger of a run: RUN/events.jsonl, one line per event, append-only.

The launcher and rank 0 write it; `megatron-eso goodput` reads it (launch/ledger.py). Every line holds
the wall clock, the machine's monotonic clock and the boot it belongs to, so clock jumps are noticed.
"""

import logging
import os
import time
from pathlib import Path
from typing import Any

from megatron_eso.files import append_json, read_json_lines

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
        append_json(run / EVENTS, line)
    except OSError as error:
        log.warning("event %s could not be written to %s: %s", event, run / EVENTS, error)


def read_events(run: Path) -> list[dict[str, Any]]:
    """Return all events in the order written; a line cut off by a crash is left out."""
    found = read_json_lines(run / EVENTS)
    return [event for event in found if "event" in event and "time" in event]


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:
        return ""
