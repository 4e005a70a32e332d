"""Stands for the trainer in tests of the job's survival: same contract, no torch.

Counts steps, commits a checkpoint every 5, saves on a signal and exits 75, obeys the lease, writes
status.json and, for the test to see, its environment. RUN/fault.json asks for faults:
{"crash": {"restart": [0], "rank": 1, "step": 7}},
{"save_nothing": true}; "steps" is the length of the run, and an attempt whose restart is among "endless"
ends by a signal only.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from megatron_eso.errors import CheckpointError
from megatron_eso.launch import lease

rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
attempt = os.environ["MEGATRON_ESO_ATTEMPT"]
overrides = [o.partition("=")[2].strip("'") for o in sys.argv[3:] if o.startswith("folder=")]
run = Path(overrides[0]) if overrides else Path(sys.argv[2]).parents[1]
fault = json.loads((run / "fault.json").read_text()) if (run / "fault.json").exists() else {}
is_endless = int(attempt.split(".")[1]) in fault.get("endless", [])
total = 10**9 if is_endless else fault.get("steps", 20)
flag = ""


def remember(number, frame):
    global flag
    flag = signal.Signals(number).name


for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, remember)


def say(text):
    with open(run / "trainer.log", "a") as file:
        file.write(f"{attempt} {os.environ['SLURMD_NODENAME']} rank {rank}/{size} {text}\n")


def write(name, content):
    part = run / f"{name}.{attempt}.{rank}.part"
    part.write_text(json.dumps(content))
    part.replace(run / name)


def save(step):
    if fault.get("save_nothing"):
        return
    try:
        lease.require_lease(run / "checkpoints", attempt)
    except CheckpointError as error:
        say(f"FENCED {error}")
        os._exit(9)
    folder = run / "checkpoints" / f"step_{step:010d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "COMMITTED").touch()


def status(state, step, **facts):
    write("status.json", {"state": state, "step": step, "total_steps": total, "loss": 1.0,
                          "updated": time.time(), **facts})  # fmt: skip


def first_step():
    found = (run / "checkpoints").glob("step_*/COMMITTED")
    return max((int(p.parent.name[5:]) for p in found), default=0)


if rank == 0:
    write("environment.json", dict(os.environ))
step = first_step()
# Each start of the ranks within an attempt has a port of its own.
this = f"{attempt}.{os.environ['MASTER_PORT']}"
mine, ending = f"beat.{this}.{rank}", run / f"ending.{this}"
write(mine, time.time())
began = time.time()
while len(list(run.glob(f"beat.{this}.*[0-9]"))) < size:  # as a first collective does
    time.sleep(0.1)
    if time.time() - began > 240:
        say("a peer never came")
        os._exit(13)
say(f"start at {step}")  # every rank catches signals by now
while step < total:
    time.sleep(0.2)
    step += 1
    write(mine, time.time())
    crash = fault.get("crash", {})
    if rank == crash.get("rank") and step == crash["step"]:
        if int(attempt.split(".")[1]) in crash["restart"]:
            say("CRASH")
            os._exit(3)
    if flag and not ending.exists():
        ending.write_text(flag)
    if rank != 0:
        if ending.exists():
            say(f"stops on {ending.read_text()}")
            os._exit(75)
        continue
    for peer in range(1, size):
        seen = json.loads((run / f"beat.{this}.{peer}").read_text())
        if time.time() - seen > 60:
            say("lost a peer")
            os._exit(13)
    if ending.exists():
        time.sleep(1)  # the other ranks exit first: srun must not end this one
        save(step)
        status("stopped", step, reason=ending.read_text())
        say(f"saved at {step} on {ending.read_text()}")
        os._exit(75)
    if step % 5 == 0:
        save(step)
        status("running", step)
if rank == 0:
    save(step)
    status("finished", step)
    say(f"finished at {step}")
