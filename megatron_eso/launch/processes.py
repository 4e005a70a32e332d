"""Child processes that end with their parent: no rank, writer or template outlives its launcher.

A child gets a session of its own (the terminal's Ctrl-C reaches it through its launcher alone, once)
and the kernel kills it when its parent dies. The launcher adopts whatever its ranks leave behind, so
a writer of a killed rank is found and ended too. Both are Linux calls; elsewhere they do nothing.
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
"""Signals that ask a run to save and stop. They wait in a new rank until it is ready for them."""


def adopt_orphans() -> None:
    """Make this process the parent of what its dead children leave behind."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when ``parent`` ends; end now if it has."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def spawn(
    command: Sequence[str],
    environment: Mapping[str, str],
    inherit: Sequence[int],
    errors: int | None = None,
) -> int:
    """Start a command in a session of its own and return its process id.

    Args:
        command: program and arguments.
        environment: its whole environment.
        inherit: file descriptors that stay open in it.
        errors: file descriptor that takes its standard error; None: as of this process.
    """

    def become() -> None:
        for descriptor in inherit:
            os.set_inheritable(descriptor, True)
        if errors is not None:
            os.dup2(errors, 2)
        os.execvpe(command[0], list(command), dict(environment))

    return fork_into_session(become)


def fork_into_session(run: Callable[[], None]) -> int:
    """Fork a child that ends with this process and has a session of its own; return its process id.

    Args:
        run: what the child does, signals held; if it comes back the child ends with code 127.
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
    finally:  # it came back, or exec failed
        os._exit(127)


def hold_signals() -> set[signal.Signals]:
    """Let signals that ask for a stop wait until :func:`release_signals`; return the mask before."""
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING))  # type: ignore[arg-type]


def ignore_signals() -> None:
    """Let the signals that stop a run do nothing from here on: the work is done, the process ends.

    A launcher repeats them, and Python gives up its own handlers before it has taken everything apart;
    the process would die of the next one and look like a fault.
    """
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def release_signals() -> None:
    """Take signals that have waited."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def send(pid: int, number: int) -> None:
    """Send a signal to one process, which may have ended."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def kill_session(pid: int) -> None:
    """Kill a child and everything in its session, also what it left behind."""
    for send_to in (os.killpg, os.kill):
        try:
            send_to(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


def reap(wait_seconds: float = 0.0) -> dict[int, int]:
    """Return the exit codes of children that have ended: pid -> code, or -signal.

    Args:
        wait_seconds: go on until no child is left, at most this long.
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

    Its listener starts seconds later, once it has imported torch. So it is none of the ports that the
    kernel gives to whoever asks for any: a connection that goes out in between would take it.
    """
    for _ in range(100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", random.SystemRandom().randrange(*_OWN_PORTS)))
            return probe.getsockname()[1]
    raise ClusterError(
        f"no free port: 100 tried between {_OWN_PORTS[0]} and {_OWN_PORTS[1]} are all taken"
    )


def _own_ports() -> tuple[int, int]:
    """Return the larger range of ports that the kernel does not give away."""
    try:
        first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    except (OSError, ValueError):
        first, last = 32768, 60999  # Linux's default
    return max((10_000, first), (last + 1, 65_536), key=lambda ports: ports[1] - ports[0])


_OWN_PORTS = _own_ports()
