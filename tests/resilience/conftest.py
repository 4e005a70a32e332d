"""A tiny run with faults under the real launcher, and the undisturbed run it is compared with."""

import json
import os
import random
import resource
import subprocess
import sys
import time

import psutil
import pytest

from megatron_eso.checkpoint.compare import compare
from megatron_eso.checkpoint.folder import list_folders
from tests import forked

MARK = resource.RLIMIT_MSGQUEUE
SETTINGS = [
    "model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "model.vocab_size=300",
    "train.sequence_length=32", "train.global_batch_rows=4", "train.micro_batch_rows=2",
    "train.log_every_steps=5", "objective.alpha_0=1", "optimizer.ema_decay=0.9", "eval.num_rows=4",
    "precision.dtype=fp32", "parallel.tensor=2", "checkpoint.keep_last=3",
    "data.sources=[{path: ../data/train}]", "resilience.straggler_every_steps=0",
]  # fmt: skip


class Faulty:
    """Starts runs in one folder of data."""

    def __init__(self, folder):
        self.folder = folder
        self.marks = {}  # name of a run: limit of its processes

    def command(self, *arguments, code=0, limits=None):
        return forked.run(*arguments, folder=self.folder / "x", code=code, limits=limits)

    def mark(self, name):
        """A resource limit that nothing comes near, by which all processes of a run can be told."""
        drawn = random.SystemRandom().randrange(1000, 800_000)
        return {MARK: self.marks.setdefault(name, drawn)}

    def new_python(self, name, *arguments):
        """Start ``python -m ARGUMENTS`` for a run, which imports everything itself."""
        soft, hard = self.mark(name)[MARK], resource.getrlimit(MARK)[1]
        environment = {
            **os.environ, **forked.AT_IMPORT, "FAULTS": str(self.folder / "x" / f"{name}.faults"),
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # which restarts by torchrun need
        }  # fmt: skip
        environment.pop("RANK", None)
        return subprocess.Popen(
            [sys.executable, "-m", *arguments], cwd=self.folder / "x", text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
            preexec_fn=lambda: resource.setrlimit(MARK, (soft, hard)),
        )  # fmt: skip

    def torchrun(self, name, *overrides, faults=()):
        """Run two ranks under torchrun."""
        self.plan(name, faults)
        process = self.new_python(
            name, "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=2",
            "--monitor-interval=0.1", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m",
            "tests.resilience.faulty_rank", *self.arguments(name, overrides),
        )  # fmt: skip
        out, _ = process.communicate(timeout=600)
        assert process.returncode == 0, out
        self.assert_nothing_left(name)

    def plan(self, name, faults):
        """Write down a run's faults, unless it goes on with those it had; return the file."""
        plan = self.folder / "x" / f"{name}.faults"
        if not plan.exists():
            plan.write_text(json.dumps(list(faults)))
        return plan

    def arguments(self, name, overrides):
        return ["train", "run.yaml", f"folder={name}", *SETTINGS, *overrides]

    def start(self, name, *overrides, faults=(), num_ranks=2, is_forked=True, **supervision):
        """Start a supervised run; return the launcher's process.

        ``is_forked``: see tests/forked.py; else the launcher and its template are new Pythons.
        """
        plan, arguments = self.plan(name, faults), self.arguments(name, overrides)
        given = {"arguments": arguments, "num_ranks": num_ranks, "run": name, "is_warm": True}
        launcher = "tests.resilience.launcher", json.dumps({**given, **supervision})
        if not is_forked:
            return self.new_python(name, *launcher)
        return forked.start(
            launcher[1], module=launcher[0], folder=self.folder / "x", limits=self.mark(name),
            environment={"FAULTS": str(plan)}, is_one_output=True,
        )  # fmt: skip

    def run(self, name, *overrides, code=0, **named):
        """Run to the end; return the output. Nothing may be left behind."""
        process = self.start(name, *overrides, **named)
        out, _ = process.communicate(timeout=1200)
        assert process.returncode == code, f"exit code {process.returncode}\n{out}"
        self.assert_nothing_left(name)
        return out

    def assert_equal(self, one, other):
        """The newest checkpoints of two runs hold the same bits."""
        newest = [
            list_folders(self.folder / "x" / name / "checkpoints")[-1] for name in (one, other)
        ]
        assert newest[0].step == newest[1].step
        assert all(folder.damage(hashes=True) == "" for folder in newest)
        found = compare(*newest)
        assert {d.group for d in found} == {"weights", "exp_avg", "exp_avg_sq", "ema"}
        assert all(d.is_bitwise_equal for d in found), found

    def assert_no_process(self, name):
        """No process of the run is alive."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and self.processes_of(name):
            time.sleep(0.1)
        assert not self.processes_of(name)

    def processes_of(self, name):
        """Processes of a run that live: all have the mark of the first."""
        found = []
        for process in psutil.process_iter():
            try:
                limit, _ = process.rlimit(MARK)
                if limit == self.marks[name] and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def assert_nothing_left(self, name):
        """No process of the run is alive and no temporary file of it exists."""
        self.assert_no_process(name)
        left = [p.name for p in (self.folder / "x" / name).rglob("*") if p.name.endswith(".part")]
        assert not left

    def events(self, name, kind=None):
        lines = (self.folder / "x" / name / "events.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        return [event for event in found if kind in (None, event["event"])]

    def log(self, name):
        return (self.folder / "x" / name / "log.txt").read_text()


def flip_a_bit(folder):
    """Change one bit in the middle of a checkpoint's largest file: only its hash can tell."""
    file = max(folder.path.glob("*.distcp"), key=lambda path: path.stat().st_size)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


@pytest.fixture(scope="session")
def faulty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faulty")
    place = Faulty(folder)
    (folder / "x").mkdir()
    (folder / "text").mkdir()
    for number in range(20):
        words = " ".join(f"word{(number * i) % 97} is {i % 7}" for i in range(1, 80))
        (folder / f"text/{number}.txt").write_text(f"document {number}\n{words}\n")
    place.command("data", "prepare", "../text", "--out", "../data", "--sequence-length", 32,
                  "--vocab-size", 300, "--validation-fraction", 0.2)  # fmt: skip
    (folder / "x" / "run.yaml").write_text("data: {validation: {text: ../data/validation}}\n")
    yield place
    for name in place.marks:
        for process in place.processes_of(name):
            process.kill()


@pytest.fixture(scope="session")
def undisturbed(faulty):
    """Twelve steps without a fault: what every disturbed run must end with."""
    faulty.run("undisturbed", "train.steps=12", "train.save_every_steps=2")
    return "undisturbed"
