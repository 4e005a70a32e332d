"""Is this node fit to train? One process per node, before step 0, writes RUN/slurm/health.

Looked at: device files, a file of the network's plugin, a file written to the run folder and read back,
the clock, a command of the site. Standard library only, as the node's own Python runs it. A node that
writes nothing counts as sick.
"""

import argparse
import os
import subprocess
import time
from pathlib import Path

from megatron_eso.launch.environment import node_name
from megatron_eso.launch.records import Records


def problems(
    folder: Path,
    node: str,
    *,
    num_devices: int,
    device_folder: Path,
    command: str,
    max_skew: float,
    file: str = "",
    file_lacks: str = "",
) -> list[str]:
    """Return what is wrong with this node; empty if it is fit.

    Args:
        folder: folder on the shared file system to write a probe into.
        node: name of the node.
        num_devices: number of nvidiaN files that must exist in ``device_folder``; 0: do not look.
        device_folder: where the device files are.
        command: the site's own command, run by bash; empty: none.
        max_skew: largest allowed difference from the file system's clock, in seconds.
        file: a file that the network needs on each node; empty: none.
        file_lacks: what it means if the file is missing.
    """
    found = []
    if num_devices:
        devices = [p for p in device_folder.glob("nvidia*") if p.name[6:].isdigit()]
        if len(devices) < num_devices:
            found.append(f"{len(devices)} of {num_devices} GPUs in {device_folder}")
    if file and not os.access(file, os.R_OK):
        found.append(f"no {file}: {file_lacks}")
    probe, content = folder / f"{node}.probe", os.urandom(1 << 16)
    try:
        probe.write_bytes(content)
        if probe.read_bytes() != content:
            found.append(f"{folder} returns other bytes than were written")
        skew = abs(probe.stat().st_mtime - time.time())
        if skew > max_skew:
            found.append(f"clock is {skew:.0f} s off the file system's")
        probe.unlink()
    except OSError as error:
        found.append(f"cannot write to {folder}: {error.strerror}")
    if command:
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines()
            found.append(": ".join([f"health.command exited {done.returncode}", *said[-1:]]))
    return found


def main() -> None:
    """Check this node and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--attempt", required=True)
    parser.add_argument("--num-devices", type=int, default=0)
    parser.add_argument("--device-folder", type=Path, default=Path("/dev"))
    parser.add_argument("--command", default="")
    parser.add_argument("--file", default="")
    parser.add_argument("--file-lacks", default="")
    parser.add_argument("--max-skew", type=float, default=30.0)
    options = parser.parse_args()
    node, records = node_name(os.environ), Records(options.run)
    found = problems(
        records.make_health_folder(options.attempt),
        node,
        num_devices=options.num_devices,
        device_folder=options.device_folder,
        command=options.command,
        max_skew=options.max_skew,
        file=options.file,
        file_lacks=options.file_lacks,
    )
    records.set_problems(options.attempt, node, found)


if __name__ == "__main__":
    main()
