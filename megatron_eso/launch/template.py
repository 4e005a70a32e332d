"""A process that has imported everything and forks ranks, so that a restart costs no imports.

    python -m megatron_eso.launch.template SOCKET LAUNCHER MODULE...

reads lines {"module": M, "arguments": [...], "environment": {...}, "errors": file descriptor or null}
from a socket and answers each with the process id of a rank that runs ``python -m M ARGUMENTS``. The
rank becomes the launcher's child: the launcher adopts orphans, and the process between the two ends
immediately. For CPU runs only, as a GPU that was used before a fork cannot be used after it.
"""

import importlib
import json
import os
import runpy
import socket
import sys
import time
import traceback
from typing import Any

from megatron_eso.garbage import look_at_new_objects, look_rarely
from megatron_eso.launch.processes import die_with_parent, hold_signals


def main() -> None:
    """Import the modules, then start ranks until the launcher closes the socket."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    launcher = int(sys.argv[2])
    look_rarely()
    for name in sys.argv[3:]:
        importlib.import_module(name)
    look_at_new_objects()  # ranks share memory that the collector does not scan and so does not write
    with channel.makefile("r") as lines:
        for line in lines:
            if not os.fork():
                _hand_over(channel, launcher, json.loads(line))
            os.wait()
    os._exit(0)


def _hand_over(channel: socket.socket, launcher: int, order: dict[str, Any]) -> None:
    """Fork the rank and end this process, which makes the rank the launcher's child."""
    rank = os.fork()
    if rank:
        channel.sendall(f"{rank}\n".encode())
        os._exit(0)
    os.setsid()
    hold_signals()
    while os.getppid() != launcher:
        if os.getppid() == 1:
            os._exit(1)
        time.sleep(0.001)
    die_with_parent(launcher)
    channel.close()
    if order["errors"] is not None:
        os.dup2(order["errors"], 2)
    os.environ.clear()
    os.environ.update(order["environment"])
    sys.argv = ["megatron_eso", *order["arguments"]]
    code = 1
    try:
        runpy.run_module(order["module"], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # Tearing down what the template imported would first copy most of its memory, for seconds.
    os._exit(code)


if __name__ == "__main__":
    main()
