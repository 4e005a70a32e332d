"""The real trainer on two nodes: whatever happens to the job, the weights are those of a quiet run.

Each test puts several events into one run, as every start costs the imports of torch and Megatron.
"""

import re
import sys

import pytest

from tests.slurm_cluster.conftest import command, wait_for
from tests.slurm_cluster.submitted import Run

STEPS = 400
SETTINGS = f"""
model: {{hidden_size: 64, num_layers: 2, num_heads: 2, vocab_size: 280}}
objective: {{alpha_0: 0.5}}
train:
  {{sequence_length: 16, global_batch_rows: 16, micro_batch_rows: 4, steps: {STEPS}, log_every_steps: 5,
   save_every_steps: 50}}
optimizer: {{ema_decay: 0.99}}
precision: {{dtype: fp32}}
eval: {{num_rows: 4}}
resilience: {{straggler_every_steps: 0}}
"""


class RealRun(Run):
    """A submitted run of the real trainer, one rank on each of two nodes."""

    def __init__(self, slurm, folder, data):
        folder.mkdir(parents=True)
        config = folder.parent / f"{folder.name}.yaml"
        config.write_text(f"data: {{sources: [{{path: {data}/train}}]}}\n{SETTINGS}")
        self.submit(
            slurm, folder, config, f"cluster.python={sys.executable}", "cluster.memory=1000M"
        )

    def step(self):
        """Return the last step that status.json tells."""
        file = self.folder / "status.json"
        return self.json_or_empty(file).get("step", 0)

    def json_or_empty(self, file):
        from megatron_eso.files import read_json

        return read_json(file)

    def wait_step(self, step):
        """Wait until the newest start of the ranks has done a step."""

        def is_there():
            file, launches = self.folder / "status.json", self.events("launching")
            return launches and self.step() >= step and file.stat().st_mtime > launches[-1]["time"]

        self._wait(is_there, f"step {step}")

    def nodes(self):
        """Return the nodes of the newest start of the ranks."""
        return self.events("launching")[-1]["nodes"]


@pytest.fixture(scope="module")
def quiet_run(cluster, data, tmp_path_factory):
    """The run that nothing happened to."""
    run = RealRun(cluster, tmp_path_factory.mktemp("quiet") / "run", data)
    run.wait_state("COMPLETED")
    assert run.field("Restarts") == "0"
    return run


def assert_same_weights(first, second):
    """The newest checkpoints are of the last step and equal in every byte that training decides."""
    for run in (first, second):
        assert run.json_or_empty(run.folder / "status.json")["step"] == STEPS
    done = command("checkpoint", "compare", first.folder, second.folder, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_walltime_and_a_preemption_change_no_bit(slurm, quiet_run, data, tmp_path):
    run = RealRun(slurm, tmp_path / "run", data)
    run.wait_step(30)
    # What Slurm sends before the limit (--signal=B:USR1), at a moment of our choosing.
    slurm.run("scancel", "--batch", "--signal=USR1", run.job)
    run.wait_output("decision: requeue")
    saved = run.events("end")[0]["step"]
    assert 0 < saved < STEPS
    assert re.search("requeue: stopped by (SIGUSR1|a signal) with a checkpoint", run.output())
    run.hurry()
    run.wait_step(saved + 60)
    slurm.run("sbatch", "-p", "high", "-N5", "--exclusive", "-o", tmp_path / "hi", "--wrap", "true")
    run.wait_restart(2)
    run.wait_state("COMPLETED")
    begins = [event["step"] for event in run.events("begin")]
    assert begins[0] == -1 and begins[1] == saved and saved < begins[2] < STEPS
    assert_same_weights(quiet_run, run)
    text = command("status", run.folder).stdout
    assert f"step {STEPS}/{STEPS}" in text and "attempts 3" in text
    begun = re.search(r"start-up  ([\d.]+) s to the first collective of attempt \d+\.2", text)
    assert begun and 0 < float(begun[1]) < 300


def test_a_dead_node_and_a_split_network_change_no_bit(slurm, quiet_run, data, tmp_path):
    """One node loses power. Then both nodes are parted from Slurm but not from the file system.

    The parted ranks are frozen meanwhile, as those of a machine that stalls; when they go on, the job
    runs elsewhere and their next checkpoint is refused.
    """
    run = RealRun(slurm, tmp_path / "run", data)
    run.wait_step(60)
    dead = run.nodes()[1]
    slurm.kill_node(dead)
    run.wait_restart(1)
    wait_for(lambda: len(run.events("launching")) == 2)
    assert "down" in run.records("bad_nodes.json")[dead]["reason"]
    parted = run.nodes()
    assert dead not in parted
    resumed = run.events("begin")[1]["step"]
    assert 0 < resumed < STEPS
    run.wait_step(resumed + 10)

    assert slurm.freeze(*parted) >= 4
    slurm.split_off(*parted)
    run.wait_restart(2)
    wait_for(lambda: len(run.events("launching")) == 3)
    assert not {dead, *parted} & set(run.nodes())
    slurm.freeze(*parted, stop=False)
    run.wait_output(f"{run.job}.1 lost its lease to {run.job}.2")
    run.wait_output("leave: a newer attempt")
    slurm.rejoin(*parted)
    run.wait_state("COMPLETED")
    assert run.field("Restarts") == "2"  # the parted job's script did not take the new one back
    assert_same_weights(quiet_run, run)
