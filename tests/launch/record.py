"""Record what this machine's Slurm prints, for the tests of the parsers.

    python tests/launch/record.py tests/launch/recorded-VERSION

starts a cluster of four nodes (with accounting, where slurmdbd and mariadbd are installed), puts jobs
into the states that matter, and writes squeue.txt, scontrol.txt, sinfo.txt, refusals.txt and sacct.txt.
Needs root; standard library only.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from megatron_eso.launch import slurm
from tests.slurm_cluster.accounting import AccountingDaemons
from tests.slurm_cluster.localslurm import PARTITIONS, LocalSlurm

_HOSTILE = 'it\'s a $(run); "x"|y'
_PARTITIONS = f"""{PARTITIONS}
PartitionName=closed Nodes=ALL AllowAccounts=nobody
PartitionName=short Nodes=ALL MaxTime=10"""
_REFUSED = (
    ["-N9"], ["-p", "nowhere"], ["-A", "nobody", "-N1"], ["-N1", "--gpus-per-node=99"],
    ["-N1", "--qos=gold"], ["-p", "closed", "-N1"], ["-p", "short", "-N1", "-t", "60"],
    ["-N1", "--mem=9999999"], ["-N1", "-t", "soon"],
)  # fmt: skip


def wait_for(condition, what):
    """Poll for up to two minutes."""
    end = time.time() + 120
    while not condition():
        if time.time() > end:
            sys.exit(f"timed out: {what}")
        time.sleep(0.2)


def submit(cluster, *options, work="sleep 600"):
    """Submit a job with our comment; return its id."""
    words = ["--parsable", "--comment=megatron-eso", "--requeue", "-o", "/dev/null", *options]
    return cluster.run("sbatch", *words, "--wrap", work, check=False).stdout.strip()


def reason(cluster, job):
    """Return squeue's state and reason of a job."""
    return cluster.run("squeue", "-h", "-j", job, "-o", "%T %r", check=False).stdout.strip()


def make_jobs(cluster, folder):
    """Put one job into each state."""
    done = submit(cluster, "-N2", "-J", "done", work="sleep 3")
    wait_for(lambda: "RUNNING" in reason(cluster, done), "the first job")
    cluster.run("scontrol", "requeue", done)
    wait_for(lambda: "COMPLETED" in final(cluster, done), "the finished job")
    hostile = folder / _HOSTILE
    hostile.mkdir()
    submit(cluster, "-N2", "-J", "a b", "--chdir", hostile)
    submit(cluster, "-N9", "-J", "too many", "-p", "main")  # 24.11 refuses it, 22.05 lets it wait
    submit(cluster, "-N1", "-H", "-J", "held job")
    first = submit(cluster, "-N1", "-J", "first")
    submit(cluster, "-N1", "-d", f"afterok:{first}", "-J", "second")
    submit(cluster, "-N1", "-J", "array", "--array=0-3%1")
    requeued = submit(cluster, "-N1", "-J", "requeued")
    brake = submit(cluster, "-N1", "-J", "brake")
    for job, verb in ((requeued, "requeue"), (brake, "requeuehold")):
        wait_for(lambda job=job: "RUNNING" in reason(cluster, job), "a running job")
        cluster.run("scontrol", verb, job)
    wait_for(lambda: "held" in reason(cluster, brake).lower(), "a job on hold")
    # The last: a prolog that fails drains the only free node.
    (folder / "fail-prolog").touch()
    failed = submit(cluster, "-N1", "-J", "prolog")
    wait_for(lambda: "launch" in reason(cluster, failed), "a failed prolog")
    return done


def final(cluster, job):
    """Return scontrol's record of a job."""
    return cluster.run("scontrol", "show", "job", "-o", job, check=False).stdout


def record(cluster, folder, out):
    """Write the files."""
    prolog = folder / "prolog.sh"
    prolog.chmod(0o755)
    done = make_jobs(cluster, folder)
    files = {
        "squeue.txt": cluster.run("squeue", "-h", "-a", "-o", slurm.QUEUE_FORMAT).stdout,
        "scontrol.txt": cluster.run("scontrol", "show", "job", "-o").stdout,
        "sinfo.txt": cluster.run("sinfo", "-h", "-o", slurm.SINFO_FORMAT).stdout,
        "sinfo_reasons.txt": cluster.run("sinfo", "-hN", "-o", "%N|%T|%E").stdout,
        "version.txt": cluster.run("sinfo", "--version").stdout,
    }
    refusals = ""
    for options in _REFUSED:
        said = cluster.run("sbatch", "--test-only", *options, "--wrap", "true", check=False)
        refusals += f"== {' '.join(options)}\n{said.stderr}"
    cluster.run("sacctmgr", "-i", "modify", "user", "root", "set", "maxsubmitjobs=1", check=False)
    time.sleep(2)
    said = cluster.run("sbatch", "-N1", "--wrap", "true", check=False)
    files["refusals.txt"] = f"{refusals}== -N1 (one job a user)\n{said.stderr}"
    said = cluster.run("sacct", "-DXnP", "-j", done, "-o", slurm.SACCT_FIELDS, check=False)
    files["sacct.txt" if said.returncode == 0 else "sacct_refusal.txt"] = said.stdout + said.stderr
    out.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (out / name).write_text(text.replace(str(folder), "/shared"))


def main():
    """Record on this machine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out.absolute()
    folder = Path(tempfile.mkdtemp(prefix="record"))
    prolog = folder / "prolog.sh"
    prolog.write_text(f"#!/bin/sh\n[ ! -e {folder}/fail-prolog ]\n")
    options = {"nodes": 4, "partitions": _PARTITIONS}
    with AccountingDaemons(folder) as daemons:
        extra = f"Prolog={prolog}\n{daemons.conf}"
        with LocalSlurm(folder / "cluster", extra=extra, **options) as cluster:
            daemons.register(cluster)
            record(cluster, folder, out)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
