"""Watch the cloud's metadata server and tell a rank to save before its machine is taken away.

On Google Cloud neither spot preemption nor host maintenance sends the job a signal. One process per
node asks the metadata server once a second and, once a warning has come, sends SIGTERM to the local
rank 0 each second until it ends: a rank that is still starting ignores signals, and one alone would be
lost. The ranks then agree on a step and save. Maintenance of a machine with GPUs is announced an hour
before: the node is noted, so that the requeued job gets another; where it got this one all the same, the
notice was there before the ranks and is no reason to stop again. Source: the Compute Engine
documentation of `instance/preempted` (TRUE, about 30 s before the end) and `instance/maintenance-event`.
"""

import argparse
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Collection
from pathlib import Path

from megatron_eso.launch.environment import node_name
from megatron_eso.launch.processes import send
from megatron_eso.launch.records import Records

SERVER = os.environ.get("METADATA_SERVER", "http://metadata.google.internal")
MAINTENANCE = "maintenance-event"
_QUIET = {"preempted": {"FALSE", ""}, MAINTENANCE: {"NONE", ""}}


def warning(
    server: str, timeout_seconds: float = 2.0, names: Collection[str] = tuple(_QUIET)
) -> str:
    """Return the announced event of this machine as NAME=VALUE, or an empty string.

    Raises:
        OSError: if the server does not answer.
    """
    for name in names:
        request = urllib.request.Request(
            f"{server}/computeMetadata/v1/instance/{name}", headers={"Metadata-Flavor": "Google"}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout_seconds) as reply:
                value = reply.read().decode().strip()
        except urllib.error.HTTPError as error:
            error.close()
            continue  # the server answers but does not know this value
        if value.upper() not in _QUIET[name]:
            return f"{name}={value}"
    return ""


def watch(pid: int, server: str, every_seconds: float, records: Records | None = None) -> None:
    """Send SIGTERM to ``pid`` repeatedly after the first warning; return when the process is gone.

    Args:
        pid: the local rank 0, or a process that passes signals on to it.
        server: address of the metadata server.
        every_seconds: time between two queries.
        records: where to note maintenance of this node; None: nowhere.
    """
    has_complained, reason = False, ""
    names: Collection[str] | None = None
    while _lives(pid) and not reason:
        try:
            if names is None:
                names = _worth_stopping_for(server)
            reason = warning(server, names=names)
        except OSError as error:
            if not has_complained:
                _say(f"metadata server {server}: {error}; spot preemption goes unseen")
            has_complained = True
        if not reason:
            time.sleep(every_seconds)
    if reason:
        _say(f"metadata server: {reason}; asking the ranks to save and stop")
    if reason.startswith(MAINTENANCE) and records is not None:
        records.announce(node_name(os.environ), f"the cloud announces {reason}")
    while reason and _lives(pid):
        send(pid, signal.SIGTERM)
        time.sleep(every_seconds)


def _worth_stopping_for(server: str) -> Collection[str]:
    """Return the names to watch, without maintenance that was announced before the ranks started."""
    known = warning(server, names=[MAINTENANCE])
    if known:
        _say(
            f"metadata server: {known}, from before this start; training on until the machine goes"
        )
    return [name for name in _QUIET if not (known and name == MAINTENANCE)]


def _say(text: str) -> None:
    print(text, flush=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def main() -> None:
    """Watch for the process given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pid", type=int, required=True)
    parser.add_argument("--server", default=SERVER)
    parser.add_argument("--every", type=float, default=1.0)
    parser.add_argument("--run", type=Path, help="run folder, to note maintenance in")
    options = parser.parse_args()
    records = Records(options.run) if options.run else None
    watch(options.pid, options.server, options.every, records)


if __name__ == "__main__":
    main()
