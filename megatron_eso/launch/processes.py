"""Child processes that end with their parent: no rank, writer or template outlives its launcher.

A child gets its own session (the terminal's Ctrl-C reaches it only through its launcher, and once), and
the kernel kills it when its parent dies. The launcher adopts the processes that its ranks leave behind,
so it also finds and ends the writer of a killed rank. Killing with the parent and adopting are Linux
calls; elsewhere they do nothing.
"""

import ctypes
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from megatron_eso.errors import ClusterError

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals that ask a run to save and stop. A new rank blocks them until it is ready for them."""


def adopt_orphans() -> None:
    """Make this process the parent of the processes that its dead children leave behind."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when ``parent`` ends; end now if it already has."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def spawn(
    command: Sequence[str],
    environment: Mapping[str, str],
    inherit: Sequence[int],
    errors: int | None = None,
) -> int:
    """Start a command in its own session and return its process id.

    Args:
        command: program and arguments.
        environment: the command's whole environment.
        inherit: file descriptors that stay open in the command.
        errors: file descriptor that takes the command's standard error; None: that of this process.
    """

    def become() -> None:
        for descriptor in inherit:
            os.set_inheritable(descriptor, True)
        if errors is not None:
            os.dup2(errors, 2)
        os.execvpe(command[0], list(command), dict(environment))

    return fork_into_session(become)


def fork_into_session(run: Callable[[], None]) -> int:
    """Fork a child that ends with this process and has its own session; return its process id.

    Args:
        run: called in the child, with signals held; if it returns, the child ends with code 127.
    """
    parent = os.getpid()
    before = hold_signals()  # a handler of ours must not run in the child
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return child
    try:
        os.setsid()
        die_with_parent(parent)
        run()
    finally:  # run returned, or exec failed
        os._exit(127)


def hold_signals() -> set[signal.Signals]:
    """Block signals that ask for a stop until :func:`release_signals`; return the mask before."""
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING))  # type: ignore[arg-type]


def ignore_signals() -> None:
    """Ignore the signals that stop a run from here on: the work is done and the process is ending.

    A launcher repeats them, and Python drops its own handlers before it has finished shutting down. The
    next signal would kill the process, which would look like a fault.
    """
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def release_signals() -> None:
    """Unblock the signals, so that those that have waited arrive."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def send(pid: int, number: int) -> None:
    """Send a signal to one process, which may already have ended."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def kill_session(pid: int) -> None:
    """Kill a child and every process in its session, also those it left behind."""
    for send_to in (os.killpg, os.kill):
        try:
            send_to(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


def reap(wait_seconds: float = 0.0) -> dict[int, int]:
    """Return the exit codes of children that have ended: pid -> code, or -signal.

    Args:
        wait_seconds: keep waiting until no child is left, at most this long.
    """
    ended: dict[int, int] = {}
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid:
            ended[pid] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() >= deadline:
            return ended
        else:
            time.sleep(0.01)


def state_of(pid: int) -> str:
    """Return the kernel's letter for a process: R runs, S sleeps, T is stopped; '' if unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (OSError, IndexError):
        return ""


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def free_port() -> int:
    """Return a port of this machine that nobody listens on.

    The listener starts seconds later, once it has imported torch. So the port lies outside the range
    from which the kernel assigns ports: an outgoing connection in the meantime could take one of those.
    """
    for _ in range(100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", random.SystemRandom().randrange(*_OWN_PORTS)))
            return probe.getsockname()[1]
    raise ClusterError(
        f"no free port: 100 tried between {_OWN_PORTS[0]} and {_OWN_PORTS[1]} are all taken"
    )


def _own_ports() -> tuple[int, int]:
    """Return the larger of the two ranges (below, above) from which the kernel assigns no ports."""
    try:
        first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    except (OSError, ValueError):
        first, last = 32768, 60999  # Linux's default
    return max((10_000, first), (last + 1, 65_536), key=lambda ports: ports[1] - ports[0])


_OWN_PORTS = _own_ports()
