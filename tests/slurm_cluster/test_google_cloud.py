"""What is particular to slurm-gcp, with its stand-ins (cloud.py): nodes that boot, spot, pyxis, prologs.

Four machines with the names, CPUs and GPUs of A3 Mega; none is up before a job needs it.
"""

import json
import time

import pytest

from megatron_eso.launch.slurm import nodes_out_of_service
from tests.slurm_cluster.cloud import PREFIX, CloudSlurm, MetadataServer, can_build_pyxis
from tests.slurm_cluster.conftest import STAND_IN, command, require_slurm, short_folder, wait_for
from tests.slurm_cluster.submitted import Run

needs_pyxis = pytest.mark.skipif(
    not can_build_pyxis(),
    reason="NO STAND-IN FOR PYXIS: it needs gcc and slurm/spank.h (Debian: libslurm-dev)",
)
IMAGE = "/images/it's an image.sqsh"


@pytest.fixture(scope="module")
def google():
    require_slurm()
    with (
        short_folder() as folder,
        pytest.MonkeyPatch.context() as patch,
        CloudSlurm(folder, nodes=4) as cloud,
    ):
        patch.setenv("SLURM_CONF", str(cloud.conf))
        with MetadataServer(f"{cloud.net}.1") as server:
            cloud.metadata = server.values
            yield cloud


@pytest.fixture(autouse=True)
def no_jobs_left(google):
    yield
    google.run("scancel", "--user", "root", check=False)
    wait_for(lambda: not google.run("squeue", "-h").stdout.strip())


class CloudRun(Run):
    """A run of the stand-in trainer under the profile gcp-a3-mega."""

    def __init__(self, cloud, folder, *settings, fault=None, plugin=True):
        folder.mkdir(parents=True)
        (folder / "fault.json").write_text(json.dumps(fault or {}))
        plugins = folder.parent / "tcpxo"
        plugins.mkdir(exist_ok=True)
        if plugin:
            (plugins / "nccl-env-profile.sh").write_text("export NCCL_TUNED_BY_PROFILE=yes\n")
        self.submit(
            cloud, folder, "configs/run/quickstart.yaml", *settings,
            f"cluster.environment.TCPXO_FOLDER={plugins}", f"cluster.python={STAND_IN}/python.sh",
            f'cluster.container.image="{IMAGE}"', f"cluster.health.device_folder={cloud.dir}/dev",
            "train.global_batch_rows=64", "train.micro_batch_rows=2",
            "cluster.survival.in_job_restarts=0", "cluster.survival.signal_seconds=60",
            cluster="gcp-a3-mega",
        )  # fmt: skip

    def status(self):
        return command("status", self.folder).stdout


def shown_when(run, words):
    """Return status once it holds words."""
    wait_for(lambda: words in run.status())
    return run.status()


@pytest.mark.parametrize("name", ["gcp-a3-high", "gcp-a3-mega", "gcp-a3-ultra"])
def test_slurm_accepts_a_profile_as_it_is(google, tmp_path, name):
    if not can_build_pyxis():
        pytest.skip(
            "NO STAND-IN FOR PYXIS: gcc and slurm/spank.h are needed (Debian: libslurm-dev)"
        )
    said = command(
        "submit", "configs/run/quickstart.yaml", "--cluster", name, "--test-only",
        f"folder={tmp_path}/r", f"cluster.shared_folders=['{tmp_path}']",
        "train.global_batch_rows=64", "train.micro_batch_rows=2",
    ).stdout  # fmt: skip
    partition = name.removeprefix("gcp-").replace("-", "").replace("a3high", "a3")
    assert "to start at" in said and f"{PREFIX}[" in said and f"in partition {partition}" in said
    # Two whole nodes, as --exclusive and 8 x 26 CPUs ask for.
    assert "using 416 processors" in said


def test_a_machine_that_is_sold_out_is_replaced_by_another(google, tmp_path):
    """It never boots; Slurm gives it up after ResumeTimeout and requeues the job."""
    assert set(google.node_states().values()) == {"idle~"}
    sold_out = google.names[0]  # of the first rack, so Slurm takes it
    (google.dir / f"stockout-{sold_out}").touch()
    run = CloudRun(google, tmp_path / "r", "cluster.container.runtime=none")
    shown_when(run, "its nodes are booting; up to 15 min is normal here")
    run.wait_restart(1)
    assert nodes_out_of_service() == [f"1 node is down~: {sold_out} (ResumeTimeout reached)"]
    run.wait_state("COMPLETED")
    assert "finished at 20\n" in run.log() and sold_out not in run.log()
    assert not (run.folder / "slurm" / "bad_nodes.json").exists()
    (google.dir / f"stockout-{sold_out}").unlink()
    google.run("scontrol", "update", f"nodename={sold_out}", "state=resume")
    google.run("scontrol", "update", "nodename=ALL", "state=power_down")
    wait_for(lambda: set(google.node_states().values()) == {"idle~"})


@needs_pyxis
def test_nodes_boot_a_spot_machine_is_taken_and_the_run_finishes(google, tmp_path):
    run = CloudRun(google, tmp_path / "r", fault={"endless": [0]})
    text = shown_when(run, "CONFIGURING")
    assert "its nodes are booting; up to 15 min is normal here" in text and "bad node" not in text
    run.wait_log("rank 15/16 start at 0")
    run.wait_log("rank 0/16 start at 0")
    found = json.loads((run.folder / "environment.json").read_text())
    assert found["FAKE_PYXIS_CONTAINER_IMAGE"] == IMAGE
    assert {"NCCL_FASTRAK_IFNAME", "MASTER_ADDR", "NCCL_TUNED_BY_PROFILE"} <= set(
        found["FAKE_PYXIS_CONTAINER_ENV"].split(",")
    )
    mounts = found["FAKE_PYXIS_CONTAINER_MOUNTS"].split(",")
    plugins = found["TCPXO_FOLDER"]
    assert {f"{run.folder}:{run.folder}", f"{plugins}:{plugins}"} <= set(mounts)
    assert found["LD_LIBRARY_PATH"].startswith(plugins) and found["LOCAL_RANK"] == "0"
    assert found["SRUN_CPUS_PER_TASK"] == "26"

    taken = run.events("launching")[0]["nodes"][1]
    address = google.run("scontrol", "show", "node", "-o", taken).stdout
    address = address.partition("NodeAddr=")[2].split()[0]
    google.metadata[address, "preempted"] = "TRUE"
    run.wait_output("decision: requeue")
    assert "metadata server: preempted=TRUE" in run.output()
    assert "stopped by SIGTERM with a checkpoint" in run.output()
    google.kill_node(taken)  # the machine goes; slurm-gcp notices and says so
    google.run("scontrol", "update", f"nodename={taken}", "state=down", "reason=Preempted instance")
    run.wait_state("COMPLETED")
    assert f"finished at {max(run.saved(), 20)}\n" in run.log()
    assert taken not in run.events("launching")[-1]["nodes"]
    assert not (run.folder / "slurm" / "bad_nodes.json").exists()  # it was taken, not sick


@needs_pyxis
def test_a_node_without_the_network_plugin_is_sick_and_a_job_that_finds_no_other_is_held(
    google, tmp_path
):
    run = CloudRun(
        google, tmp_path / "r", "cluster.survival.max_attempts_without_progress=1", plugin=False
    )
    run.wait_output("the prolog that installs GPUDirect-TCPXO did not run")
    shown_when(run, "held      0 of 2 nodes are healthy")
    bad = run.records("bad_nodes.json")
    assert len(bad) == 2 and set(bad) <= set(google.names)
    assert run.field("Priority") == "0"


@needs_pyxis
def test_without_a_health_check_the_batch_scripts_node_finds_the_plugin_missing(google, tmp_path):
    run = CloudRun(
        google, tmp_path / "r", "cluster.survival.max_attempts_without_progress=1",
        "cluster.health.enabled=false", plugin=False,
    )  # fmt: skip
    first = shown_when(run, "held      ")
    assert "GPUDirect-TCPXO did not run" in first
    ((node, _),) = run.records("bad_nodes.json").items()
    assert node == run.events("begin")[0]["nodes"][0]


def test_a_failed_prolog_holds_the_job_and_status_says_how_to_go_on(google, tmp_path):
    (google.dir / "fail-prolog").touch()
    run = CloudRun(google, tmp_path / "r", "cluster.container.runtime=none")
    text = shown_when(run, "a prolog failed and Slurm holds the job")
    assert "megatron-eso requeue" in text
    (google.dir / "fail-prolog").unlink()
    drained = [n for n, s in google.node_states().items() if s.startswith("drain")]
    assert drained
    google.run("scontrol", "update", f"nodename={','.join(drained)}", "state=resume")
    assert "released" in command("requeue", run.folder).stdout
    run.wait_state("COMPLETED")


def test_a_maintenance_reservation_is_explained_and_a_shorter_limit_fits_before_it(
    google, tmp_path
):
    google.run(
        "scontrol", "create", "reservation", "reservationname=maintenance", "users=root",
        "flags=maint,ignore_jobs", "duration=180", "nodes=ALL",
        f"starttime={time.strftime('%Y-%m-%dT%H:%M:%S', time.localtime(time.time() + 1800))}",
    )  # fmt: skip
    try:
        long = CloudRun(
            google, tmp_path / "r", "cluster.container.runtime=none", "cluster.time_limit=1:00:00"
        )
        text = shown_when(long, "reserved for maintenance")
        assert "a shorter time_limit may fit before" in text
        assert "PENDING" in text and "bad node" not in text
        command("cancel", long.folder)
        short = CloudRun(
            google, tmp_path / "short", "cluster.container.runtime=none", "cluster.time_limit=20"
        )
        short.wait_state("COMPLETED")
    finally:
        google.run("scontrol", "delete", "reservationname=maintenance", check=False)
