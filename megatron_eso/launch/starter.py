"""How the launcher starts one rank: as a new Python process, or forked from a warm template."""

import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_eso.launch.processes import kill_session, spawn

# What training imports; PyTorch's optimizers import torch._dynamo when they are constructed.
_PRELOAD = ("megatron_eso.train.loop", "megatron_eso.cli.train", "torch._dynamo")
_DEVICES = Path("/dev")


class Starter:
    """Starts ranks of one command; used by the launcher's only thread."""

    def __init__(
        self,
        arguments: Sequence[str],
        inherit: Sequence[int],
        environment: Mapping[str, str],
        *,
        is_warm: bool,
        module: str = "megatron_eso",
        preload: Sequence[str] = _PRELOAD,
    ) -> None:
        """Store what ranks need; a template starts with the first rank.

        Args:
            arguments: what follows ``python -m MODULE``.
            inherit: file descriptors that stay open in ranks.
            environment: environment of the template; ranks get their own.
            is_warm: fork ranks from a process that has imported everything.
            module: module that a rank runs.
            preload: modules that the template imports.
        """
        self.arguments = list(arguments)
        """What follows ``python -m MODULE`` in ranks that start from now on."""
        self._inherit = list(inherit)
        self._module, self._preload = module, list(preload)
        self._environment, self._is_warm = environment, is_warm
        self._template, self._channel = 0, None

    def start(self, environment: Mapping[str, str], errors: int | None = None) -> int:
        """Return the process id of a new rank, a child of this process.

        Args:
            environment: the rank's environment.
            errors: inherited file descriptor that takes the rank's standard error; None: that of this
                process.
        """
        if not self._is_warm:
            command = [sys.executable, "-m", self._module, *self.arguments]
            return spawn(command, environment, self._inherit, errors)
        order = {"arguments": self.arguments, "environment": dict(environment),
                 "module": self._module, "errors": errors}  # fmt: skip
        for _ in range(2):  # the second time with a new template, in case the first has died
            try:
                return self._ask(json.dumps(order) + "\n")
            except OSError:
                self.close()
        raise RuntimeError("the template of the ranks did not start; see its messages above")

    def close(self) -> None:
        """End the template."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
            kill_session(self._template)

    def _ask(self, line: str) -> int:
        if self._channel is None:
            ours, theirs = socket.socketpair()
            command = [sys.executable, "-m", "megatron_eso.launch.template", str(theirs.fileno()),
                       str(os.getpid()), *self._preload]  # fmt: skip
            self._template = spawn(command, self._environment, [theirs.fileno(), *self._inherit])
            theirs.close()
            self._channel = ours
        self._channel.sendall(line.encode())
        answer = b""
        while not answer.endswith(b"\n"):
            part = self._channel.recv(64)
            if not part:
                raise ConnectionError("the template has ended")
            answer += part
        return int(answer)


def threads_of_each(number: int) -> dict[str, str]:
    """Return the variable that divides this machine's cores among ``number`` ranks; empty if it is set."""
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // number, 1))}


def can_be_warm() -> bool:
    """Return whether ranks may be forked on this machine: no GPU, and a kernel that hands over orphans."""
    return sys.platform == "linux" and not has_gpu()


def has_gpu() -> bool:
    """Return whether this machine has an NVIDIA GPU, without asking its driver."""
    names = ("nvidia[0-9]*", "dxg")  # the latter in Windows' subsystem for Linux
    return any(found for name in names for found in _DEVICES.glob(name))
