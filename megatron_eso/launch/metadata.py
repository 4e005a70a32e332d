"""Watch the cloud's metadata server and tell a rank to save before its machine is taken away.

On Google Cloud neither spot preemption nor host maintenance sends the job a signal. One process per
node asks the metadata server once a second and, once a warning has come, sends SIGTERM to the local
rank 0 each second until it ends: a rank that is still starting ignores signals, and one alone would be
lost. The ranks then agree on a step and save. Source: the Compute Engine documentation of
`instance/preempted` (TRUE, about 30 s before the end) and `instance/maintenance-event`.
"""

import argparse
import os
import signal
import time
import urllib.error
import urllib.request

from megatron_eso.launch.processes import send

SERVER = os.environ.get("METADATA_SERVER", "http://metadata.google.internal")
_QUIET = {"preempted": {"FALSE", ""}, "maintenance-event": {"NONE", ""}}


def warning(server: str, timeout_seconds: float = 2.0) -> str:
    """Return what is about to happen to this machine, or an empty string.

    Raises:
        OSError: if the server does not answer.
    """
    for name, quiet in _QUIET.items():
        request = urllib.request.Request(
            f"{server}/computeMetadata/v1/instance/{name}", headers={"Metadata-Flavor": "Google"}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout_seconds) as reply:
                value = reply.read().decode().strip()
        except urllib.error.HTTPError as error:
            error.close()
            continue  # the server is there but does not know the value
        if value.upper() not in quiet:
            return f"{name}={value}"
    return ""


def watch(pid: int, server: str, every_seconds: float) -> None:
    """Send SIGTERM to ``pid`` from the first warning on; return when the process is gone."""
    has_complained, reason = False, ""
    while _lives(pid) and not reason:
        try:
            reason = warning(server)
        except OSError as error:
            if not has_complained:
                print(f"metadata server {server}: {error}; spot preemption goes unseen", flush=True)
            has_complained = True
        if not reason:
            time.sleep(every_seconds)
    if reason:
        print(f"metadata server: {reason}; asking the ranks to save and stop", flush=True)
    while reason and _lives(pid):
        send(pid, signal.SIGTERM)
        time.sleep(every_seconds)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def main() -> None:
    """Watch on behalf of a process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pid", type=int, required=True)
    parser.add_argument("--server", default=SERVER)
    parser.add_argument("--every", type=float, default=1.0)
    options = parser.parse_args()
    watch(options.pid, options.server, options.every)


if __name__ == "__main__":
    main()
