"""Python looks for cycles rarely while a command starts, and only at new objects while it trains."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CYCLES = """
import gc, weakref
from megatron_eso.garbage import look_at_new_objects, look_rarely

class Thing: pass

def cycle():
    thing = Thing()
    thing.itself = thing
    return weakref.ref(thing)

look_rarely()
young = [cycle() for _ in range(1000)]
assert all(ref() is not None for ref in young)
look_at_new_objects()
later = cycle()
gc.collect()
assert young[-1]() is not None and later() is None
look_rarely()
look_at_new_objects()
"""


def in_a_process(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split()


def test_cycles_of_before_are_left_alone_and_new_ones_found():
    usual = gc.get_threshold()
    printed = "print(*gc.get_threshold())"
    found = in_a_process(f"import gc\n{printed}\n{CYCLES}\n{printed}")
    assert list(map(int, found)) == [*usual, *usual]


TRAINS = """
import gc, sys
from megatron_eso import config
from megatron_eso.train import loop

class Run:
    def __init__(self, *given): print(gc.get_threshold()[0], gc.get_freeze_count())
    def train(self): print(gc.get_threshold()[0], gc.get_freeze_count()); return 0

loop.Run = Run
config.check = lambda *given: None  # its data need not be there
sys.argv = ["megatron-eso", "train", *sys.argv[1:]]
from megatron_eso.cli.main import main
main()
"""


@pytest.mark.slow
def test_training_begins_with_a_settled_heap():
    found = in_a_process(TRAINS, ROOT / "configs/run/quickstart.yaml", "parallel.local_ranks=1")
    before, frozen_before, after, frozen_after = map(int, found)
    usual = gc.get_threshold()[0]
    assert (before, after) == (100 * usual, usual)
    assert frozen_before == 0
    assert frozen_after > 100_000
