"""The fault table of docs/resilience.md, with real ranks under the real launcher.

Where a run goes on, it must end with the tensors of an undisturbed run, bit for bit.
"""

import random
import shutil
import subprocess

import pytest

from megatron_eso.checkpoint.folder import list_folders
from megatron_eso.launch.processes import free_port

pytestmark = pytest.mark.slow
TWELVE = ("train.steps=12", "train.save_every_steps=2")
AT_ONCE = (*TWELVE, "checkpoint.asynchronous=false")  # where the step of a restart must be certain


def test_every_kind_of_death_and_hang_is_noticed_and_survived(faulty, undisturbed):
    faults = [
        {"kind": "kill_in_setup", "rank": 0, "step": "any"},
        {"kind": "exit", "rank": 1, "step": 3},
        {"kind": "stop", "rank": 1, "step": 5},
        {"kind": "gil", "rank": 0, "step": 7},
        {"kind": "hang", "rank": 1, "step": 9},
        {"kind": "kill", "rank": 1, "step": 11},
    ]
    settings = (*AT_ONCE, "resilience.min_timeout_seconds=8")
    out = faulty.run("deaths", *settings, faults=faults, is_forked=False)
    found = faulty.events("deaths", "fault")
    assert [f["cause"] for f in found] == ["killed", "crash", "hang", "hang", "hang", "killed"]
    assert [f["step"] for f in found[1:]] == [3, 5, 7, 9, 11]
    assert "during start-up" in found[0]["why"]
    assert found[2]["rank"] == 1 and "it is stopped (SIGSTOP)" in found[2]["why"]
    assert "before_step" in out  # the stack of the rank that holds Python's lock
    assert found[5]["why"].startswith("rank 1 was killed by SIGKILL")
    assert [e["step"] for e in faulty.events("deaths", "ready")] == [0, 2, 4, 6, 8, 10]
    faulty.assert_equal("deaths", undisturbed)
    report = faulty.command("goodput", "deaths", "--plot", "deaths.png")
    assert "faults 6" in report and "lost steps 5" in report
    assert (faulty.folder / "x/deaths.png").stat().st_size > 1000


def test_a_killed_launcher_takes_its_ranks_along_and_the_next_one_continues(faulty, undisturbed):
    fault = {"kind": "launcher", "rank": 1, "step": 7}
    process = faulty.start("launcher", *TWELVE, faults=[fault], is_forked=False)
    process.communicate(timeout=600)
    assert process.returncode == -9
    faulty.assert_no_process("launcher")  # files of a save that was cut off stay for the next run
    out = faulty.run("launcher", *TWELVE)
    assert "continuing from" in out  # the lease of the dead rank was no obstacle
    faulty.assert_equal("launcher", undisturbed)


def test_torchrun_starts_a_killed_rank_again_from_the_newest_checkpoint(faulty, undisturbed):
    faulty.torchrun("torchrun", *AT_ONCE, faults=[{"kind": "kill", "rank": 1, "step": 7}])
    assert [e["step"] for e in faulty.events("torchrun", "ready")] == [0, 6]
    faulty.assert_equal("torchrun", undisturbed)


def test_a_fault_that_comes_back_ends_with_its_own_exit_code(faulty):
    always = {"kind": "exit", "rank": 1, "step": 5, "always": True}
    out = faulty.run("loop", *AT_ONCE, faults=[always], code=7, max_restarts=2)
    assert "given up after 2 faults in a row without a newer checkpoint than step 4" in out
    assert len(faulty.events("loop", "fault")) == 3  # the first had brought a checkpoint


def test_a_rank_of_srun_that_hangs_is_ended_with_its_own_exit_code(faulty):
    """One rank per task, in a new process: the job script restarts, the launcher only ends it."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(free_port())}  # fmt: skip
    faulty.run("task", *AT_ONCE, "parallel.tensor=1", "resilience.min_timeout_seconds=8", code=8,
               faults=[{"kind": "gil", "step": 4}], num_ranks=1, rank_environment=place,
               max_restarts=0, is_warm=False)  # fmt: skip
    assert [e["cause"] for e in faulty.events("task", "fault")] == ["hang"]


def test_a_save_that_fails_is_loud_and_harms_nothing(faulty, undisturbed):
    """Full disk in a writer and on rank 0, a dead writer, a slow one: training goes on."""
    faults = [
        {"kind": "full_disk", "rank": 1, "step": 4},
        {"kind": "publish_full", "rank": 0, "step": 6},
        {"kind": "writer_killed", "rank": 1, "step": 8},
        {"kind": "writer_slow", "rank": 1, "step": 10},
    ]
    out = faulty.run("saves", *TWELVE, "checkpoint.timeout_seconds=4", faults=faults)
    assert out.count("SAVE FAILED") == 4
    assert "Traceback" not in out
    assert not faulty.events("saves", "fault")
    why = [event["why"] for event in faulty.events("saves", "save_failed")]
    assert "No space left on device" in why[0] and "No space left on device" in why[1]
    assert "writer process ended with code -9" in why[2]
    assert "checkpoint.timeout_seconds=4" in why[3]
    steps = [line.split()[1] for line in faulty.command("checkpoint", "list", "saves").splitlines()]
    assert steps == ["2", "12"]
    faulty.command("checkpoint", "verify", "saves", "--every")
    faulty.assert_equal("saves", undisturbed)


@pytest.mark.parametrize(
    ("name", "fault", "step"),
    [
        ("SIGTERM", {"kind": "signal", "rank": 1, "step": 6}, 7),
        ("SIGUSR1", {"kind": "in_evaluation", "rank": 1, "step": "any"}, 6),
        ("SIGINT", {"kind": "signal_in_setup", "rank": 0, "step": "any"}, 0),
        ("SIGTERM", {"kind": "signal_in_compilation", "rank": 1, "step": "any"}, 1),
        ("SIGTERM", {"kind": "signal_in_save", "rank": 1, "step": 4}, 4),
    ],
    ids=["step", "evaluation", "setup", "compilation", "save"],
)
def test_a_signal_to_one_rank_saves_at_an_agreed_step(faulty, undisturbed, name, fault, step):
    settings, run = (*TWELVE, "train.eval_every_steps=6"), f"{name}{step}"
    out = faulty.run(run, *settings, faults=[{**fault, "signal": name}], code=75)
    assert f"at step {step} with a checkpoint" in out and "s after the signal" in out
    stop = faulty.events(run, "stop")[0]
    assert stop["step"] == step and stop["seconds"] < 60
    faulty.run(run, *settings)
    faulty.assert_equal(run, undisturbed)


def test_a_transient_nan_or_spike_leaves_no_trace(faulty, undisturbed):
    faults = [{"kind": "nan", "rank": 1, "step": 6}, {"kind": "spike", "rank": 0, "step": 9}]
    out = faulty.run("transient", *TWELVE, "resilience.spike_window=5", faults=faults)
    assert out.count("the step is run again") == 2
    faulty.assert_equal("transient", undisturbed)


def test_a_nan_that_stays_stops_with_its_own_exit_code(faulty):
    nan = {"kind": "nan", "rank": 1, "step": 5, "always": True}
    out = faulty.run("nan", *TWELVE, faults=[nan], code=5)
    assert "step 5 is saved" in out and "resilience.on_nonfinite" in out
    assert "step          5" in faulty.command("checkpoint", "list", "nan")


def test_skipping_and_rolling_back_leave_the_same_batch_out(faulty):
    nan = {"kind": "nan", "rank": 1, "step": 5, "always": True}
    kill = {"kind": "kill", "rank": 0, "step": 9}
    faulty.run("skip", *AT_ONCE, "resilience.on_nonfinite=skip", faults=[nan])
    faulty.run("rollback", *AT_ONCE, "resilience.on_nonfinite=rollback", faults=[nan, kill])
    assert len(faulty.events("rollback", "rollback")) == 1
    assert len(faulty.events("rollback", "fault")) == 1
    faulty.assert_equal("skip", "rollback")
    assert "left_out=[5]" in faulty.command("checkpoint", "inspect", "skip")


def test_a_step_that_a_run_goes_back_to_is_not_evaluated_again(faulty):
    nan = {"kind": "nan", "rank": 0, "step": 4, "always": True}
    settings = ("train.steps=6", "train.save_every_steps=2", "train.eval_every_steps=2",
                "parallel.tensor=1", "resilience.on_nonfinite=rollback")  # fmt: skip
    faulty.run("evaluated", *settings, faults=[nan], num_ranks=1, max_restarts=0)
    assert [e["step"] for e in faulty.events("evaluated", "rollback")] == [5]
    assert len(faulty.events("evaluated", "evaluation")) == 3  # steps 2, 4 and 6


def test_twenty_random_kills_end_with_the_weights_of_an_undisturbed_run(faulty):
    """kill -9 on 2 x 2 ranks at seeded moments of 200 steps, a third of them inside saves."""
    draw, faults = random.Random(4), []
    for number in range(20):
        step = 6 + 9 * number + draw.randrange(9)
        in_save = number % 3 == 0
        faults.append(
            {
                "kind": "kill_in_save" if in_save else "kill",
                "rank": draw.randrange(4),
                "step": step - step % 5 + 5 if in_save else step,
                "after": draw.random() * 0.2,
            }
        )
    settings = ("train.steps=200", "train.save_every_steps=5", "train.log_every_steps=50")
    faulty.run("kills_none", *settings, num_ranks=4)
    faulty.run("kills", *settings, num_ranks=4, faults=faults, max_restarts=30)
    assert 18 <= len(faulty.events("kills", "fault")) <= 20  # two may meet in one restart
    assert len(faulty.events("kills_none", "fault")) == 0
    faulty.assert_equal("kills", "kills_none")


@pytest.mark.parametrize("is_flipped", [False, True], ids=["whole", "flipped bit"])
def test_a_restart_takes_the_newest_valid_of_local_and_shared(
    faulty, undisturbed, tmp_path, is_flipped
):
    """Shared checkpoints of steps 4 and 8, node-local copies of steps 3, 6 and 9; killed at step 7."""
    name = f"local{is_flipped}"
    settings = ("train.steps=12", "train.save_every_steps=4", "checkpoint.asynchronous=false",
                f"checkpoint.local_folder={tmp_path}", "checkpoint.local_every_steps=3")  # fmt: skip
    exit_at_7 = [{"kind": "exit", "rank": 0, "step": 7}]
    faulty.run(name, *settings, faults=exit_at_7, max_restarts=0, code=1)
    copies = sorted(tmp_path.rglob("step_0000000006.pt"))
    assert len(copies) == 2
    if is_flipped:  # of one rank: then no rank may use that step
        raw = bytearray(copies[1].read_bytes())
        raw[len(raw) // 2] ^= 1
        copies[1].write_bytes(raw)
    out = faulty.run(name, *settings)
    expected = "step_0000000004" if is_flipped else "node-local copies of step 6 (shared: 4)"
    assert f"continuing from {name}/checkpoints/{expected}" in out or f"from {expected}" in out
    faulty.assert_equal(name, undisturbed)
    assert not list(tmp_path.iterdir())  # a finished run leaves no copies


def test_a_damaged_checkpoint_is_passed_over_and_the_run_ends_the_same(faulty, undisturbed):
    """A flipped bit in the newest, a truncated shard in the one before: the third is used."""
    place = faulty.folder / "x"
    shutil.copytree(place / undisturbed, place / "damaged")
    third, second, newest = list_folders(place / "damaged" / "checkpoints")
    shard = next(newest.path.glob("*.distcp"))
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    shard = next(second.path.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "another hash" in faulty.command("checkpoint", "verify", newest.path.absolute(), code=4)
    out = faulty.run("damaged", *TWELVE)
    assert "has another hash than when it was written" in out and "bytes instead of" in out
    assert f"continuing from damaged/checkpoints/{third.path.name}" in out
    faulty.assert_equal("damaged", undisturbed)


def test_a_disk_that_another_process_fills_during_a_save_stops_nothing(
    faulty, undisturbed, tmp_path
):
    """A real full disk, a small tmpfs, from the save of step 4 until step 7."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", tmp_path]).returncode:
        pytest.skip("NO SMALL DISK HERE: mounting a tmpfs needs root")
    try:
        file, run = str(tmp_path / "filler"), tmp_path / "run"
        faults = [
            {"kind": "fill_disk", "rank": 1, "step": 4, "file": file},
            {"kind": "free_disk", "rank": 0, "step": 7, "file": file},
        ]
        run.mkdir()
        (faulty.folder / "x" / "full").symlink_to(run)
        out = faulty.run("full", *TWELVE, faults=faults)
        assert "SAVE FAILED" in out and "Traceback" not in out
        assert "no room for a checkpoint of step 6" in out
        assert [f.step for f in list_folders(run / "checkpoints")] == [8, 10, 12]
        faulty.assert_equal("full", undisturbed)
    finally:
        subprocess.run(["umount", tmp_path], check=True)
