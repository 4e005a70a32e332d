"""A real Slurm cluster of five isolated nodes on this machine, one for the session.

The jobs' runs live in a session folder that all nodes see. Without slurmctld and slurmd every test
here is skipped, and says so: tools/install_slurm.sh installs them.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.slurm_cluster.localslurm import LocalSlurm

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 300
STAND_IN = Path(__file__).with_name("stand_in")


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(item.fspath).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.slurm)
            item.add_marker(pytest.mark.slow)


def can_isolate():
    probe = ["unshare", "--pid", "--fork", "--mount", "--mount-proc", "--uts", "--net", "true"]
    return bool(shutil.which("ip")) and subprocess.run(probe, capture_output=True).returncode == 0


def require_slurm():
    """Skip, saying why, where no cluster can be started."""
    if not Path("/usr/sbin/slurmctld").exists() or not Path("/usr/sbin/slurmd").exists():
        pytest.skip(
            "NO SLURM HERE, nothing of the job's survival is tested: tools/install_slurm.sh"
        )
    if not can_isolate():
        pytest.skip("NO NAMESPACES HERE: nodes cannot be isolated (needs root or `unshare`)")


def short_folder():
    """A cluster's folder: pytest's own are too long for Slurm's sockets (LocalSlurm checks it)."""
    return tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp", ignore_cleanup_errors=True)


@pytest.fixture(scope="session")
def cluster():
    require_slurm()
    partitions = (
        "PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=0\n"
        "PartitionName=grace Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=60\n"
        "PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF"
    )
    with (
        short_folder() as folder,
        LocalSlurm(folder, nodes=5, isolate=True, die_with_parent=True, partitions=partitions) as s,
    ):
        os.environ["SLURM_CONF"] = str(s.conf)
        yield s


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A small prepared data set for the real trainer."""
    folder = tmp_path_factory.mktemp("data")
    text = folder / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(f"document {number} " * 50)
    command("data", "prepare", text, "--out", folder / "data", "--sequence-length", 16,
            "--vocab-size", 280, "--validation-fraction", 0.2)  # fmt: skip
    return folder / "data"


@pytest.fixture
def slurm(cluster):
    """The cluster, idle before and after."""
    yield cluster
    cluster.run("scancel", "--user", os.getuid(), check=False)
    for node, state in cluster.node_states().items():
        if state.startswith(("down", "drain")) or state.endswith("*"):
            cluster.kill_node(node)
            cluster.start_node(node)
            cluster.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
    wait_for(lambda: set(cluster.node_states().values()) == {"idle"})


def wait_for(condition):
    """Wait as long as a busy machine may need: other work on it must not fail a test."""
    end = time.time() + PATIENCE_SECONDS
    while not condition():
        assert time.time() < end, "timed out"
        time.sleep(0.3)


def command(*words, check=True, cwd=None, **environment):
    """Run ``megatron-eso WORDS`` as a person would."""
    done = subprocess.run(
        [sys.executable, "-m", "megatron_eso", *map(str, words)],
        capture_output=True, text=True, cwd=cwd or ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def field(slurm, job, name):
    record = slurm.run("scontrol", "show", "job", "-o", job).stdout
    return re.search(rf"\b{name}=(\S+)", record)[1]


def state(slurm, job):
    return field(slurm, job, "JobState")
