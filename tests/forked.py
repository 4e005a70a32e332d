"""Commands for tests that start many of them: forked from a process that has imported everything.

A new Python imports for five seconds before a command does anything. After that, a forked command does not
differ: module, arguments, folder, environment, limits, signals, exit handlers and exit code are its own.
The template from which a launcher forks ranks is also forked from that process. Tests that start a new
Python or a real template with ``sys.executable`` cover those two.
"""

import atexit
import importlib
import io
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_eso.garbage import look_at_new_objects, look_rarely
from megatron_eso.launch import starter, template
from megatron_eso.launch.processes import STOPPING, die_with_parent, fork_into_session, spawn

ROOT = Path(__file__).parent.parent
# Read when torch is imported, so they are the same for all commands.
AT_IMPORT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
IMPORTS = (
    "megatron_eso.train.loop", "megatron_eso.cli.train", "torch._dynamo", "torch.utils.tensorboard",
    "megatron_eso.cli.model_loading", "megatron_eso.eval.evaluate", "megatron_eso.sample.generate",
)  # fmt: skip


class Command:
    """A started command with those parts of subprocess.Popen that tests use."""

    def __init__(self, control: socket.socket, stdout: int, stderr: int | None) -> None:
        self._control, self._said = control, b""
        self.stdout = os.fdopen(stdout)
        self.stderr = None if stderr is None else os.fdopen(stderr)
        self.returncode: int | None = None
        self.pid = int(self._line(None))

    def _line(self, timeout: float | None) -> str:
        """Return the next line from the process that waits for the command; TimeoutError if none comes."""
        self._control.settimeout(timeout)
        while b"\n" not in self._said:
            part = self._control.recv(64)
            if not part:
                raise AssertionError("the process that waits for the command has died")
            self._said += part
        line, self._said = self._said.split(b"\n", 1)
        return line.decode()

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code, or minus the signal that ended it; TimeoutError after ``timeout`` s."""
        if self.returncode is None:
            self.returncode = int(self._line(timeout))
            self._control.close()
        return self.returncode

    def poll(self) -> int | None:
        """Return the exit code if the command has ended."""
        try:
            return self.wait(0.0)
        except (TimeoutError, BlockingIOError):
            return None

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Return the command's standard output and standard error, once it has ended."""
        said = {"out": "", "err": ""}

        def read(name: str, file: io.TextIOWrapper) -> None:
            said[name] = file.read()
            file.close()

        files = [("out", self.stdout)] + ([("err", self.stderr)] if self.stderr else [])
        readers = [threading.Thread(target=read, args=pair, daemon=True) for pair in files]
        for reader in readers:
            reader.start()
        try:
            self.wait(timeout)
        except TimeoutError:
            self.kill()
            raise
        for reader in readers:
            reader.join(60.0)
            assert not reader.is_alive(), "a process that the command left behind holds its output"
        return said["out"], said["err"]

    def send_signal(self, number: int) -> None:
        """Send a signal if the command has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the command and its session."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)


_first: list[Any] = []


def start(
    *arguments: object,
    folder: Path,
    module: str = "megatron_eso",
    environment: Mapping[str, str] | None = None,
    limits: Mapping[int, int] | None = None,
    is_one_output: bool = False,
) -> Command:
    """Start ``python -m MODULE ARGUMENTS``.

    Args:
        arguments: arguments of the command.
        folder: folder in which the command runs.
        module: module that the command runs.
        environment: variables in addition to this process's; none may be one that is read at import.
        limits: soft resource limits (resource.RLIMIT_...), which all processes it starts inherit.
        is_one_output: send standard error where standard output goes.
    """
    variables = {**os.environ, **AT_IMPORT, **(environment or {})}
    variables.pop("RANK", None)
    assert all(variables[name] == value for name, value in AT_IMPORT.items())
    order = {"module": module, "arguments": list(map(str, arguments)), "folder": str(folder),
             "environment": variables, "limits": list((limits or {}).items())}  # fmt: skip
    out, its_out = os.pipe()
    err, its_err = (None, os.dup(its_out)) if is_one_output else os.pipe()
    control, its_control = socket.socketpair()
    theirs = [its_out, its_err, its_control.fileno()]
    socket.send_fds(_channel(), [json.dumps(order).encode()], theirs)
    os.close(its_out)
    os.close(its_err)
    its_control.close()
    return Command(control, out, err)


def run(*arguments: object, folder: Path, code: int = 0, **named: Any) -> str:
    """Run a command to its end, check its exit code, return standard output and standard error."""
    process = start(*arguments, folder=folder, **named)
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out + err


def _channel() -> socket.socket:
    """Return the channel to the process that all commands are forked from; it ends with this one."""
    if not _first:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "tests.forked", str(theirs.fileno()), str(os.getpid())]
        environment = {**os.environ, **AT_IMPORT}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=[theirs.fileno()])
        theirs.close()
        _first.extend((ours, process))
        atexit.register(lambda: (ours.close(), process.wait()))
    return _first[0]


def _serve(channel: socket.socket) -> None:
    """Start commands until the channel is closed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        order, files, _, _ = socket.recv_fds(channel, 1 << 20, 3)
        if not order:
            os._exit(0)
        if not os.fork():
            channel.close()
            _watch(json.loads(order), *files)
        for file in files:
            os.close(file)


def _watch(order: dict, out: int, err: int, control: int) -> None:
    """Start the command; report its process id and, when it has ended, its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if not pid:
        os.close(control)
        _become(order, out, err)
    os.close(out)
    os.close(err)
    os.write(control, f"{pid}\n".encode())
    _, status = os.waitpid(pid, 0)
    os.write(control, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _become(order: dict, out: int, err: int) -> None:
    """Become the command until the process ends."""
    os.setsid()
    os.chdir(order["folder"])
    for limit, soft in order["limits"]:
        resource.setrlimit(limit, (soft, resource.getrlimit(limit)[1]))
    os.environ.clear()
    os.environ.update(order["environment"])
    for number, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, out), (2, err)):
        os.dup2(file, number)
        os.close(file)
    sys.stdout = io.TextIOWrapper(open(1, "wb", closefd=False))
    sys.stderr = io.TextIOWrapper(
        open(2, "wb", closefd=False), line_buffering=True, errors="backslashreplace"
    )
    starter.spawn = _spawn
    sys.argv = [order["module"], *order["arguments"]]
    code: object = 0
    try:
        runpy.run_module(order["module"], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # waits for threads and runs modules' exit handlers, as a new Python does
    atexit._run_exitfuncs()
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code or 0))


def _spawn(
    command: Sequence[str],
    environment: Mapping[str, str],
    inherit: Sequence[int],
    errors: int | None = None,
) -> int:
    """Fork a launcher's template, whose imports are already here; start other commands as usual."""
    if list(command[1:3]) != ["-m", template.__name__]:
        return spawn(command, environment, inherit, errors)

    def become() -> None:
        for number in STOPPING:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = list(command[2:])
        try:
            template.main()
        except BaseException:
            traceback.print_exc()

    return fork_into_session(become)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[2]))
    look_rarely()
    for name in IMPORTS:
        importlib.import_module(name)
    look_at_new_objects()
    _serve(socket.socket(fileno=int(sys.argv[1])))
