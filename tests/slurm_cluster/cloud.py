"""Stand-ins for what slurm-gcp adds to Slurm: nodes that boot on demand, the metadata server, pyxis.

A file DIR/stockout-NODE makes that node's boot fail; DIR/power.log has Slurm's calls.
"""

import http.server
import shutil
import subprocess
import sys
import threading
from pathlib import Path

from tests.slurm_cluster.localslurm import LocalSlurm

PYXIS = Path(__file__).with_name("stand_in") / "fake_pyxis.c"
PREFIX = "a3mega-a3meganodeset-"
_POWER = """#!/bin/bash
echo "$(date +%T) {what} $1" >>{folder}/power.log
export SLURM_CONF={folder}/slurm.conf
sleep {seconds}
for node in $(scontrol show hostnames "$1"); do
    [ -e {folder}/stockout-$node ] || {python} {program} {verb} {folder} $node >>{folder}/power.log 2>&1
done
"""
_PROLOG = """#!/bin/bash
[ ! -e {folder}/fail-prolog ]
"""
_PARTITIONS = "\n".join(
    f"PartitionName={name} Nodes=ALL Default={default} OverSubscribe=EXCLUSIVE PriorityTier=1 "
    "PreemptMode=REQUEUE GraceTime=0"
    for name, default in (("a3mega", "YES"), ("a3", "NO"), ("a3ultra", "NO"))
)


class CloudSlurm(LocalSlurm):
    """Machines of the A3 kind (208 CPUs, 8 GPUs) that Slurm boots when a job needs them."""

    def __init__(self, state, *, nodes, boot_seconds=2):
        folder = Path(state).absolute()
        self.boot_seconds = boot_seconds
        extra = [
            f"ResumeProgram={folder}/resume.sh", f"SuspendProgram={folder}/suspend.sh",
            f"ResumeFailProgram={folder}/suspend.sh", f"Prolog={folder}/prolog.sh",
            "ResumeTimeout=60", "SuspendTimeout=5", "SuspendTime=900", "PrivateData=cloud",
            "SlurmctldParameters=idle_on_node_suspend", "TopologyPlugin=topology/tree",
        ]  # fmt: skip
        super().__init__(
            state, nodes=nodes, cpus=208, gpus=8, mem=1_000_000, prefix=PREFIX, isolate=True,
            die_with_parent=True, partitions=_PARTITIONS, extra="\n".join(extra),
        )  # fmt: skip

    def _configure(self):
        super()._configure()
        lines = self.conf.read_text().splitlines()
        self.conf.write_text(
            "\n".join(f"{x} State=CLOUD" if x.startswith("NodeName=") else x for x in lines) + "\n"
        )
        program = Path(__file__).with_name("localslurm.py")
        for what, verb, seconds in (
            ("resume", "start-node", self.boot_seconds),
            ("suspend", "kill-node", 0),
        ):
            text = _POWER.format(what=what, verb=verb, seconds=seconds, folder=self.d,
                                 python=sys.executable, program=program)  # fmt: skip
            self._program(f"{what}.sh", text)
        self._program("prolog.sh", _PROLOG.format(folder=self.d))
        # Two racks: even and odd nodes.
        racks = [",".join(self.names[i::2]) for i in (0, 1)]
        (self.d / "topology.conf").write_text(
            "".join(f"SwitchName=rack{i} Nodes={nodes}\n" for i, nodes in enumerate(racks))
            + "SwitchName=spine Switches=rack[0-1]\n"
        )
        if can_build_pyxis():
            library = self.d / "fake_pyxis.so"
            subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, PYXIS], check=True)
            (self.d / "plugstack.conf").write_text(f"required {library}\n")

    def _program(self, name, text):
        (self.d / name).write_text(text)
        (self.d / name).chmod(0o755)

    def start_node(self, n):
        """Do nothing: booting is Slurm's business."""

    def boot(self, n):
        """Boot a node as Google's own restart of a spot machine does."""
        super().start_node(n)

    def _ready(self):
        return set(self.node_states().values()) == {"idle~"}


def can_build_pyxis():
    """Return whether the stand-in of pyxis can be compiled."""
    return bool(shutil.which("gcc")) and Path("/usr/include/slurm/spank.h").exists()


class MetadataServer:
    """Compute Engine's metadata server for isolated nodes, which know it by its usual name.

    ``values`` maps (client's address, "preempted" or another name below instance/) to an answer.
    """

    def __init__(self, address):
        self.values = values = {}

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path.partition("/computeMetadata/v1/instance/")[2]
                answer = values.get((self.client_address[0], name))
                is_known = answer is not None and self.headers["Metadata-Flavor"] == "Google"
                self.send_response(200 if is_known else 404)
                self.end_headers()
                self.wfile.write(answer.encode() if is_known else b"")

            def log_message(self, *words):
                pass

        self._server = http.server.ThreadingHTTPServer((address, 80), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *problem):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
