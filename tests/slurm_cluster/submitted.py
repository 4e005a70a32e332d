"""A submitted run as a test sees it: its job, its files, and waits that end as soon as they can."""

import json
import sys

from tests.slurm_cluster.conftest import STAND_IN, command, field, state, wait_for


def quoted(path):
    """Return a path as a YAML string."""
    return "'" + str(path).replace("'", "''") + "'"


class Run:
    """A submitted run of the stand-in trainer (stand_in/trainer.py)."""

    def __init__(self, slurm, folder, *settings, fault=None):
        folder.mkdir(parents=True, exist_ok=True)
        if fault:
            (folder / "fault.json").write_text(json.dumps(fault))
        self.submit(
            slurm, folder, "configs/run/quickstart.yaml",
            f"cluster.python={STAND_IN}/python.sh",
            f"cluster.environment.STAND_IN_PYTHON={sys.executable}", "train.global_batch_rows=16",
            "train.micro_batch_rows=2", "cluster.survival.in_job_restarts=0", *settings,
        )  # fmt: skip

    def submit(self, slurm, folder, config, *settings, cluster="local"):
        """Submit and remember the job."""
        self.slurm, self.folder = slurm, folder
        out = command(
            "submit", config, "--cluster", cluster, f"cluster.host_python={sys.executable}",
            f"folder={quoted(folder)}", f"cluster.shared_folders=[{quoted(folder.parent)}]", *settings,
        ).stdout  # fmt: skip
        self.job = out.split()[1]

    def log(self):
        """Return what the stand-in trainers wrote."""
        file = self.folder / "trainer.log"
        return file.read_text() if file.exists() else ""

    def saved(self):
        """Return the step that the stand-in first saved on a signal."""
        return int(self.log().split("saved at ")[1].split()[0])

    def output(self):
        """Return the job's output, all attempts."""
        return "".join(p.read_text() for p in self.folder.glob("slurm-*.out"))

    def wait_log(self, text):
        self._wait(lambda: text in self.log(), repr(text))

    def wait_output(self, text):
        self._wait(lambda: text in self.output(), repr(text))

    def wait_state(self, *states):
        self._wait(lambda: state(self.slurm, self.job) in states, states)

    def wait_restart(self, number):
        """Wait until Slurm has taken the job back ``number`` times."""
        self._wait(lambda: int(self.field("Restarts")) >= number, f"restart {number}")

    def field(self, name):
        """Return a field of scontrol's record of the job."""
        return field(self.slurm, self.job, name)

    def hurry(self):
        """Skip the credential wait of a requeued job, as a person would."""
        self._wait(lambda: self.field("Reason") == "BeginTime", "BeginTime")
        assert "without waiting" in command("watch", "--once", self.folder).stdout

    def records(self, name):
        """Return a JSON file of RUN/slurm."""
        return json.loads((self.folder / "slurm" / name).read_text())

    def events(self, name):
        """Return the job's events of one kind."""
        file = self.folder / "slurm" / "attempts.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [e for e in map(json.loads, lines) if e["event"] == name]

    def _wait(self, condition, what):
        try:
            wait_for(condition)
        except AssertionError:
            text = f"{state(self.slurm, self.job)}\n{self.log()}\n{self.output()}\n{self.slurm.problem()}"
            raise AssertionError(f"not {what} but {text}") from None
