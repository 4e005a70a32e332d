"""The account of a run from its events: every second has one cause, and clocks may jump."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_eso.errors import UserError
from megatron_eso.launch import events, timeline
from megatron_eso.launch.ledger import CAUSES, Stretch, account, clock, read_ledger
from megatron_eso.launch.timeline import write_timeline


def event(kind, at, *, boot="b", wall=0.0, **facts):
    return {"event": kind, "clock": 100.0 + at, "time": 1e9 + at + wall, "boot": boot, **facts}


def fault(at, step, silent=0.0):
    return event("fault", at, step=step, why="rank 1 died", cause="killed", silent_seconds=silent)


INTERRUPTED = [
    event("launch", 0), event("start", 2), event("setup", 8), event("ready", 10, step=0),
    event("checkpoint", 60, step=40, seconds=10.0), event("committed", 65, step=40),
    fault(150, 120, silent=10.0), event("start", 151), event("setup", 158),
    event("ready", 161, step=40), event("evaluation", 251, seconds=30.0),
    event("stop", 261, step=120, state="finished"), event("launch_end", 261, code=0),
]  # fmt: skip


def test_every_second_has_one_cause():
    ledger = account(INTERRUPTED)
    assert ledger.elapsed == 261
    assert sum(ledger.seconds(cause) for cause in CAUSES) == pytest.approx(261)
    assert ledger.seconds("set-up") == 20
    assert ledger.seconds("checkpoint stall") == 10
    assert ledger.seconds("evaluation") == 30
    assert ledger.seconds("fault detection") == 10
    assert ledger.seconds("restart") == 1


def test_steps_that_are_done_again_are_lost_time():
    ledger = account(INTERRUPTED)
    # 120 steps in 40 + 80 seconds of training; 80 of them were done again.
    assert ledger.lost_steps == 80
    assert ledger.seconds("lost steps") == pytest.approx(80)
    assert ledger.seconds("training") == pytest.approx(40 + 70)
    assert ledger.effective_share == pytest.approx(110 / 261)
    assert ledger.mean_seconds_between_failures == pytest.approx(261)


def test_a_stall_is_not_done_again():
    farther_back = [{**e, "step": 20} if e["clock"] == 261 else e for e in INTERRUPTED]
    ledger = account(farther_back)
    assert ledger.lost_steps == 100
    assert ledger.seconds("lost steps") == pytest.approx(100)
    assert ledger.seconds("checkpoint stall") == 10


def test_no_step_is_lost_where_the_next_start_went_on_from_beyond_the_last_event():
    """As from a node-local copy."""
    later = [fault(150, 40), event("start", 151), event("ready", 161, step=60), event("stop", 170)]
    assert account([*INTERRUPTED[:6], *later]).lost_steps == 0


def test_ranks_that_no_launcher_starts_are_counted_by_their_set_up():
    ledger = account(
        [
            event("setup", 0),
            event("ready", 10, step=0),
            event("setup", 50),
            event("ready", 60, step=0),
        ]
    )
    assert (ledger.num_starts, ledger.seconds("set-up")) == (2, 20)


@pytest.mark.parametrize(
    "found",
    [
        pytest.param(
            [event("evaluation", 62, seconds=30.0)], id="longer than since the last stall"
        ),
        pytest.param(
            [event("checkpoint", 145, step=50, seconds=10.0), fault(150, 50, silent=10.0)],
            id="in the silence before a fault",
        ),
        pytest.param([fault(70, 40, silent=500.0)], id="silent for longer than it ran"),
    ],
)
def test_no_second_counts_twice(found):
    ledger = account([*INTERRUPTED[:5], *found])
    assert sum(ledger.seconds(cause) for cause in CAUSES) == pytest.approx(ledger.elapsed)


def test_durations_are_shown_in_days_hours_and_minutes():
    assert [clock(s) for s in (59.0, 600, 90_061)] == ["59.0 s", "0:10:00", "1 d 1:01:01"]


def test_a_run_that_waits_for_its_next_launch_is_not_running():
    later = [{**e, "clock": e["clock"] + 1000, "time": e["time"] + 1000} for e in INTERRUPTED]
    ledger = account([*INTERRUPTED, *later])
    assert ledger.seconds("not running") == pytest.approx(1000 - 261)
    assert len(ledger.faults) == 2
    assert ledger.mean_seconds_between_failures == pytest.approx(261)


def test_a_launch_that_finds_the_run_finished_is_left_out():
    idle = [event("launch", 900), event("start", 900), event("launch_end", 903, code=0)]
    assert account([*INTERRUPTED, *idle]) == account(INTERRUPTED)
    failed = [*idle[:2], event("launch_end", 903, code=2)]
    assert account([*INTERRUPTED, *failed]).elapsed == 903


def test_one_fault_reported_by_two_launchers_counts_once():
    doubled = [*INTERRUPTED[:7], fault(150.2, 120), *INTERRUPTED[7:]]
    assert len(account(doubled).faults) == 1


@pytest.mark.parametrize("jump", [-3600.0, 7200.0])
def test_a_wall_clock_that_jumps_is_reported_and_not_counted(jump):
    moved = [{**e, "time": e["time"] + (jump if i > 5 else 0)} for i, e in enumerate(INTERRUPTED)]
    ledger = account(moved)
    assert ledger.elapsed == 261
    assert ledger.clock_jumps == [pytest.approx(jump)]
    assert any("jumped" in line for line in ledger.lines())


def test_across_machines_the_wall_clock_counts_but_never_backwards():
    elsewhere = {"boot": "other", "wall": -50}
    ledger = account(
        [event("start", 0), event("setup", 5, **elsewhere), event("ready", 10, step=0, **elsewhere)]
    )
    assert ledger.elapsed == 5
    assert ledger.clock_jumps == [-45]


def test_without_a_boots_name_the_wall_clock_counts():
    assert account([event("start", 0, boot=""), event("setup", 5, boot="", wall=10)]).elapsed == 15


def test_what_the_clocks_of_two_machines_differ_by_is_no_jump():
    ledger = account([event("start", 0), event("setup", 5, boot="other", wall=-5.2)])
    assert ledger.elapsed == 0
    assert ledger.clock_jumps == []


def test_a_line_cut_off_by_a_crash_does_not_take_the_next_one_along(tmp_path):
    events.record(tmp_path, "start")
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"event": "setup", "ti')
    events.record(tmp_path, "ready", step=3)
    events.record(tmp_path, "stop", step=3)
    assert [e["event"] for e in events.read_events(tmp_path)] == ["start", "ready", "stop"]
    assert (tmp_path / "events.jsonl").read_text().count("\n") == 4  # and no empty lines


def test_events_survive_a_torn_line_and_an_unwritable_folder(tmp_path, caplog):
    events.record(tmp_path, "start")
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"event": "setup", "ti\n')
    events.record(tmp_path, "stop", step=3)
    assert [e["event"] for e in events.read_events(tmp_path)] == ["start", "stop"]
    (tmp_path / "file").write_text("")
    events.record(tmp_path / "file", "start")
    assert "could not be written" in caplog.text


def test_a_folder_without_events_is_a_message(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match=r"has no events.jsonl"):
            read_ledger(path)


def test_a_plot_that_cannot_be_written_is_a_message():
    with pytest.raises(UserError, match=r"--plot /proc/none/a\.png"):
        write_timeline(account(INTERRUPTED), Path("/proc/none/a.png"))


def test_the_account_can_be_written_as_json():
    json.dumps({cause: account(INTERRUPTED).seconds(cause) for cause in CAUSES})


def test_the_timeline_shows_its_whole_legend(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(timeline, "write_figure", lambda out, figure, dpi: drawn.append(figure))
    write_timeline(replace(account(INTERRUPTED), stretches=[
        Stretch(float(n), float(n + 1), cause) for n, cause in enumerate(CAUSES)
    ]), tmp_path / "a.png")  # fmt: skip
    [figure] = drawn
    figure.draw_without_rendering()
    [legend] = [*figure.legends, *(a.get_legend() for a in figure.axes if a.get_legend())]
    assert len(legend.get_texts()) == len(CAUSES)
    box = legend.get_window_extent()
    assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1 and figure.bbox.x0 <= box.x0
    [axis] = figure.axes
    assert not box.overlaps(axis.xaxis.get_tightbbox())
