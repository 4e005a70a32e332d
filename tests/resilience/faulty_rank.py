"""A rank of `megatron-eso train` with faults: what ranks run in these tests instead of the command.

FAULTS in the environment names a JSON file: a list of {"rank", "step", "kind", ...}. Each fault happens
once (a marker file beside it), unless it has "always". Kinds:

kill       SIGKILL of itself "after" seconds after the step began; launcher: of its launcher too
kill_in_save  SIGKILL of itself "after" seconds after a save of that step began
stop       SIGSTOP of itself          gil   a C call that keeps Python's lock
hang       sleep for ever             exit  an exception
nan        the step's gradient norm is nan       spike  the step's loss is 1000 times as large
full_disk  writing a shard fails as on a full disk     publish_full  writing the metadata does
fill_disk  takes all room of the disk with "file" while a shard is written; free_disk  removes it
writer_killed, writer_slow  the writer process is killed, sleeps
signal     sends "signal" to itself   in_evaluation, signal_in_compilation, signal_in_save  the same there
"""

import ctypes
import errno
import json
import os
import signal
import threading
import time
from pathlib import Path

import torch

from megatron_eso.checkpoint import strategy
from megatron_eso.cli import main
from megatron_eso.train import guard, keeper, loop, validation

RANK = int(os.environ.get("RANK", 0))


def faults(kind, step):
    """Return the faults of a kind that are to happen now on this rank, and remember them."""
    path = Path(os.environ["FAULTS"])
    found = []
    for number, fault in enumerate(json.loads(path.read_text())):
        if (
            fault["kind"] == kind
            and fault.get("rank", 0) == RANK
            and fault["step"] in (step, "any")
        ):
            marker = path.with_suffix(f".{number}.done")
            if fault.get("always") or not marker.exists():
                marker.touch()
                found.append(fault)
    return found


def kill_later(seconds):
    def run():
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=run, daemon=True).start()


def compile_something():
    """Compile a function by torch.compile, with a compiler in which a signal may arrive."""

    def compiler(graph, inputs):
        signal_myself("signal_in_compilation")
        return graph.forward

    torch.compile(lambda x: x + 1, backend=compiler)(torch.zeros(1))


def before_step(step):
    if "signal_in_compilation" in Path(os.environ["FAULTS"]).read_text() and step == 0:
        compile_something()
    for _ in faults("launcher", step):
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    for fault in faults("kill", step):
        kill_later(fault.get("after", 0))
    for _ in faults("stop", step):
        os.kill(os.getpid(), signal.SIGSTOP)
    for _ in faults("gil", step):
        # PyDLL, unlike CDLL, keeps the lock while it calls. No signal ends the wait for a mutex that
        # its owner asks for again, as one would end a sleep.
        mutex = ctypes.create_string_buffer(64)
        for _ in range(2):
            ctypes.PyDLL(None).pthread_mutex_lock(mutex)
    for _ in faults("hang", step):
        time.sleep(600)
    for _ in faults("exit", step):
        raise RuntimeError("injected failure")
    for fault in faults("free_disk", step):
        os.unlink(fault["file"])
    for fault in faults("signal", step):
        os.kill(os.getpid(), getattr(signal, fault["signal"]))


def misjudge(judge, step):
    """Return a judge that sees another loss or norm than there is."""
    factor = 1000.0 if faults("spike", step) else 1.0
    add = float("nan") if faults("nan", step) else 0.0
    return lambda loss, norm: judge(factor * loss, norm + add)


def install():
    """Put the faults between the trainer and what it calls."""
    train_step, evaluate, build = guard.train_step, validation.evaluate, loop.build_session

    def faulty_step(session, read, judge):
        step = session.state.step
        before_step(step)
        return train_step(session, read, misjudge(judge, step))

    def faulty_evaluate(*arguments, between, **named):
        signal_myself("in_evaluation")
        return evaluate(*arguments, between=between, **named)

    def faulty_build(*arguments, **named):
        for _ in faults("kill_in_setup", "any"):
            os.kill(os.getpid(), signal.SIGKILL)
        signal_myself("signal_in_setup")
        return build(*arguments, **named)

    guard.train_step, validation.evaluate, loop.build_session = (
        faulty_step, faulty_evaluate, faulty_build,
    )  # fmt: skip


def install_saves():
    """Put the faults of saves between the trainer and what it calls."""
    save, write, publish = keeper.Keeper.save, strategy.Plan.write, strategy.Plan.publish

    def faulty_save(self):
        global saving
        saving = self._session.state.step
        for fault in faults("kill_in_save", saving):
            kill_later(fault.get("after", 0))
        for fault in faults("signal_in_save", saving):
            os.kill(os.getpid(), getattr(signal, fault["signal"]))
        return save(self)

    def faulty_write(self):
        for kind in ("writer_killed", "writer_slow", "full_disk"):
            for _ in faults(kind, saving):
                spoil(kind)
        for fault in faults("fill_disk", saving):
            fill(fault["file"])
        return write(self)

    def faulty_publish(self, folder, results):
        for _ in faults("publish_full", saving):
            spoil("full_disk")
        return publish(self, folder, results)

    keeper.Keeper.save, strategy.Plan.write, strategy.Plan.publish = (
        faulty_save, faulty_write, faulty_publish,
    )  # fmt: skip


def fill(file):
    """Take all room of a small file system, to the last byte."""
    with open(file, "wb", buffering=0) as stream:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    stream.write(bytes(size))
            except OSError:
                continue


def spoil(kind):
    if kind == "writer_killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "writer_slow":
        time.sleep(600)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def signal_myself(kind):
    for fault in faults(kind, "any"):
        os.kill(os.getpid(), getattr(signal, fault["signal"]))


saving = -1
if __name__ == "__main__":
    RANK = int(os.environ["RANK"])
    install()
    install_saves()
    main.main()
