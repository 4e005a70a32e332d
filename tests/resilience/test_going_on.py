"""Which state a start goes on from, and what becomes of the states that it does not."""

import json
import shutil

import numpy as np
import pytest
import torch

from megatron_eso.checkpoint.folder import hash_file, list_folders
from tests.resilience.conftest import flip_a_bit
from tests.resilience.keeper_jobs import START

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def committed(run):
    return [folder.step for folder in list_folders(run / "checkpoints") if folder.is_committed]


def flip(run, *steps):
    for folder in list_folders(run / "checkpoints"):
        if folder.step in steps:
            flip_a_bit(folder)


@pytest.mark.parametrize("keep_last", [1, 2])
def test_damaged_checkpoints_take_the_place_of_no_new_ones(one_rank, run, keep_last):
    one_rank.run(START, str(run), ["checkpoint.keep_last=3"], 4, [2, 3, 4])
    flip(run, 3, 4)
    settings = [f"checkpoint.keep_last={keep_last}"]
    again = one_rank.run(START, str(run), settings, 3, [3])[0]
    assert again["first"] == 2
    assert sum("is set aside" in line for line in again["said"]) == 2
    assert committed(run) == [2, 3][-keep_last:]
    assert all(f.damage(hashes=True) == "" for f in list_folders(run / "checkpoints")[:-1])
    *_, last = list_folders(run / "checkpoints")
    assert last.step == 4 and "was set aside" in last.damage(hashes=False)  # its files are left
    assert one_rank.run(START, str(run), settings, 5, [5])[0]["first"] == 3
    assert [f.step for f in list_folders(run / "checkpoints")] == [3, 5][-keep_last:]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(one_rank, run, tmp_path):
    one_rank.run(START, str(run), [], 2, [1, 2])
    flip(run, 1, 2)
    found = one_rank.run(START, str(run), [], 3, [])[0]
    assert "none is whole (step_0000000001, step_0000000002;" in found["error"]
    assert "choose another folder=... or remove them" in found["error"]
    assert committed(run) == [1, 2]


def test_checkpoints_that_were_set_aside_are_still_checkpoints(one_rank, run, tmp_path):
    """The run went on from node-local copies, and these are lost before a new checkpoint is there."""
    settings = [f"checkpoint.local_folder={tmp_path}", "checkpoint.local_every_steps=1"]
    one_rank.run(START, str(run), settings, 2, [1])
    next(run.rglob("*.distcp")).unlink()
    assert one_rank.run(START, str(run), settings, 3, [])[0]["first"] == 2
    assert committed(run) == []
    shutil.rmtree(next(tmp_path.glob("megatron-eso-*")))
    assert (
        "none is whole (step_0000000001;"
        in one_rank.run(START, str(run), settings, 3, [])[0]["error"]
    )


def test_going_back_over_a_damaged_checkpoint_sets_it_aside(one_rank, run):
    found = one_rank.run(START, str(run), [], 4, [2, 4], 4, True)[0]
    assert (found["first"], found["went_to"]) == (0, 2)
    assert any("step_0000000004 is set aside" in line for line in found["said"])
    assert all(f.damage(hashes=True) == "" for f in list_folders(run / "checkpoints"))
    assert committed(run) == [2, 4]


def test_a_run_that_goes_back_to_step_0_does_again_what_it_did(one_rank, run):
    one_rank.run(START, str(run), [], 0, [0])
    found = one_rank.run(START, str(run), [], 3, [], 3)[0]
    once = one_rank.run(START, str(run), [], 3, [])[0]
    assert (found["first"], found["went_to"]) == (0, 0)
    assert found["losses"] == once["losses"] * 2
    for one, other in zip(found["state"], once["state"], strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("is_removed", [True, False], ids=["removed folder", "resume=never"])
def test_another_run_in_the_same_place_does_not_take_local_copies(
    one_rank, run, tmp_path, is_removed
):
    settings = [f"checkpoint.local_folder={tmp_path}", "checkpoint.local_every_steps=1"]
    one_rank.run(START, str(run), settings, 3, [])
    assert one_rank.run(START, str(run), settings, 3, [])[0]["first"] == 3
    if is_removed:
        shutil.rmtree(run)
        settings.append("optimizer.learning_rate=0.02")
    else:
        settings.append("checkpoint.resume=never")
    assert one_rank.run(START, str(run), settings, 1, [])[0]["first"] == 0
    assert [p.stem for p in tmp_path.rglob("*.pt")] == ["step_0000000001"]


def test_a_new_run_starts_from_the_weights_it_was_given_and_from_no_local_copy(
    one_rank, run, tmp_path
):
    given = tmp_path / "given"
    one_rank.run(START, str(given), [], 1, [1])
    settings = [f"checkpoint.local_folder={tmp_path}", "checkpoint.local_every_steps=1"]
    one_rank.run(START, str(run), settings, 2, [])
    shutil.rmtree(run)
    found = one_rank.run(START, str(run), [*settings, f"checkpoint.init_from={given}"], 0, [])[0]
    assert found["first"] == 0
    assert any(f"from {given}" in line for line in found["said"])
    assert any(
        line.endswith("it belongs to another run, layout, model or data set")
        for line in found["said"]
    )


@pytest.mark.parametrize("header", ["[]", "null", '{"fits": []}'])
def test_a_local_copy_whose_header_is_damaged_is_passed_over(one_rank, run, tmp_path, header):
    settings = [f"checkpoint.local_folder={tmp_path}", "checkpoint.local_every_steps=1"]
    one_rank.run(START, str(run), settings, 2, [])
    next(tmp_path.rglob("step_0000000002.json")).write_text(header)
    assert one_rank.run(START, str(run), settings, 2, [])[0]["first"] == 1


def with_copy(two_ranks, run, tmp_path):
    """Make a run with a checkpoint of step 1 and copies of step 2; return its settings."""
    settings = [f"checkpoint.local_folder={tmp_path}", "checkpoint.local_every_steps=1"]
    two_ranks.run(START, str(run), settings, 2, [1])
    assert len(list(tmp_path.rglob("step_0000000002.pt"))) == 2
    return settings


def test_copies_that_one_rank_cannot_list_are_used_by_none(two_ranks, run, tmp_path):
    settings = with_copy(two_ranks, run, tmp_path)
    job = "resilience.keeper_jobs.start_without"
    arguments = (1, "rank_00001", str(run), settings, 0, 1)
    first, second = two_ranks.run(job, *arguments, timeout=60)
    assert first["first"] == second["first"] == 1
    assert any("cannot be listed" in line and "rank_00001" in line for line in second["said"])


def test_another_file_beside_the_copies_is_none(two_ranks, run, tmp_path):
    settings = with_copy(two_ranks, run, tmp_path)
    for folder in tmp_path.rglob("rank_0000*"):
        (folder / "step_mine.json").write_text("{}")
    assert two_ranks.run(START, str(run), settings, 2, [], timeout=60)[0]["first"] == 2


@pytest.mark.parametrize("change", ["shape", "fewer", "moment", "average", "no fp8"])
def test_copies_whose_tensors_do_not_fit_one_rank_are_used_by_none(
    two_ranks, run, tmp_path, change
):
    """Copies of another version, say: their header fits."""
    settings = with_copy(two_ranks, run, tmp_path)
    [file] = tmp_path.rglob("rank_00001/step_0000000002.pt")
    stored = torch.load(file, weights_only=True)
    one = stored["shards"][0]
    if change == "fewer":
        stored["shards"].pop()
    elif change == "no fp8":
        del stored["fp8"]
    else:
        part = {"shape": 0, "moment": 2, "average": 3}[change]
        one[part] = one[part][:1].clone()  # which could be copied into any, in silence
    torch.save(stored, file)
    header = json.loads(file.with_suffix(".json").read_text())
    header |= {"bytes": file.stat().st_size, "xxh3_128": hash_file(file)}
    file.with_suffix(".json").write_text(json.dumps(header))
    first, second = two_ranks.run(START, str(run), settings, 1, [], timeout=60)
    assert first["first"] == second["first"] == 1
    for found in (first, second):
        assert any("passed over: rank 1: " in line for line in found["said"])


def test_fp8_state_that_one_rank_cannot_take_back_is_used_by_none(two_ranks, run, tmp_path):
    settings = [f"checkpoint.local_folder={tmp_path}", "checkpoint.local_every_steps=1"]
    two_ranks.run(START, str(run), settings, 0, [0])
    job = "resilience.keeper_jobs.start_with_fp8_state"
    two_ranks.run(job, str(run), settings, -1)
    assert two_ranks.run(job, str(run), settings, -1)[0]["first"] == 1
    first, second = two_ranks.run(job, str(run), settings, 1, timeout=60)
    assert first["first"] == second["first"] == 0
    assert any("passed over: rank 1: " in line and "scale_fwd" in line for line in first["said"])


def test_a_resume_reads_what_a_checkpoint_says_of_itself_once(two_ranks, run):
    two_ranks.run(START, str(run), [], 1, [1])
    assert two_ranks.run("resilience.keeper_jobs.sidecars_read", str(run)) == [1, 0]


def test_new_local_copies_last_after_one_rank_lost_its_own(two_ranks, run, tmp_path):
    settings = [f"checkpoint.local_folder={tmp_path}", "checkpoint.local_every_steps=1"]
    two_ranks.run(START, str(run), settings, 5, [1])
    shutil.rmtree(next(tmp_path.rglob("rank_00001")))
    assert two_ranks.run(START, str(run), settings, 2, [])[0]["first"] == 1
    assert len(list(tmp_path.rglob("step_0000000002.pt"))) == 2
    assert two_ranks.run(START, str(run), settings, 3, [])[0]["first"] == 2


def test_a_checkpoint_is_not_read_where_node_local_copies_are_newer(two_ranks, run, tmp_path):
    """Reading all of it would take longer than the rest of a restart."""
    settings = [f"checkpoint.local_folder={tmp_path}", "checkpoint.local_every_steps=1"]
    two_ranks.run(START, str(run), settings, 3, [1, 3])
    next(tmp_path.rglob("rank_00001/step_0000000003.json")).unlink()
    flip(run, 1, 3)
    again = two_ranks.run(START, str(run), settings, 2, [])[0]  # the one of step 3 is newer
    assert again["first"] == 2
    assert [line.split(" is ")[0][-1] for line in again["said"] if "passed over" in line] == ["3"]
    for copy in tmp_path.rglob("rank_00001/*.pt"):  # its header is whole, what it holds is not
        torch.save({}, copy)
        header = json.loads(copy.with_suffix(".json").read_text())
        header |= {"bytes": copy.stat().st_size, "xxh3_128": hash_file(copy)}
        copy.with_suffix(".json").write_text(json.dumps(header))
    assert "none is whole" in two_ranks.run(START, str(run), settings, 3, [])[0]["error"]


def test_copies_of_a_node_that_comes_back_are_not_mixed_with_those_made_meanwhile(
    two_ranks, run, tmp_path
):
    """Both hold a copy of step 2, but the others have done that step again without it."""
    settings = [f"checkpoint.local_folder={tmp_path}", "checkpoint.local_every_steps=1"]
    two_ranks.run(START, str(run), settings, 2, [1])
    copies = next(tmp_path.rglob("rank_00001"))
    shutil.move(copies, tmp_path / "away")
    assert two_ranks.run(START, str(run), settings, 3, [])[0]["first"] == 1
    shutil.rmtree(copies)
    shutil.move(tmp_path / "away", copies)
    assert [f.stem for f in sorted(copies.glob("*.pt"))] == ["step_0000000001", "step_0000000002"]
    assert two_ranks.run(START, str(run), settings, 3, [])[0]["first"] == 1


def test_copies_of_ranks_that_now_run_on_other_nodes_are_removed(two_ranks, run, tmp_path):
    settings = [f"checkpoint.local_folder={tmp_path}", "checkpoint.local_every_steps=1"]
    two_ranks.run(START, str(run), settings, 2, [1])
    copies = next(tmp_path.rglob("rank_00001"))
    shutil.copytree(copies, copies.with_name("rank_00012"))
    assert two_ranks.run(START, str(run), settings, 3, [])[0]["first"] == 2
    assert sorted(f.name for f in copies.parent.iterdir()) == ["rank_00000", "rank_00001"]


def test_training_goes_on_where_the_file_system_cannot_be_asked_for_room(two_ranks, run):
    found = two_ranks.run("resilience.keeper_jobs.saved_without_an_answer", str(run))
    assert found == [[False, True, True]] * 2


SAVED = "resilience.keeper_jobs.saved_on_a_file_system"


@pytest.mark.parametrize(
    ("seconds", "after"),
    [pytest.param(3.0, [2], id="within the limit"), pytest.param(5.0, [1, 2], id="beyond it")],
)
def test_old_checkpoints_that_go_slowly_fail_no_save(two_ranks, run, seconds, after):
    """The new one is there before; the next save counts on the room, so it waits, within reason."""
    first, second = two_ranks.run(SAVED, str(run), "remove", seconds)
    for found in (first, second):
        assert not any("SAVE FAILED" in line for line in found["said"])
        assert found["kept"][1] == (True, [1, 2], after)
        assert found["left"] == [2]
    assert any("removing old checkpoints" in line for line in first["said"]) == (seconds == 5)


def test_a_save_published_after_its_limit_leaves_no_checkpoint_behind(two_ranks, run):
    """It was said to be given up: the run may have gone back since, and left that course."""
    first, second = two_ranks.run(SAVED, str(run), "publish", 7.0)
    assert [kept for kept, *_ in first["kept"]] == [True, False, False]
    failed = [line for line in first["said"] if "SAVE FAILED" in line]
    assert len(failed) == 2 and "checkpoint.timeout_seconds=4" in failed[0]
    assert "an earlier save of this step, which was given up, still holds it" in failed[1]
    assert first["left"] == second["left"] == [1] and first["folders"] == [1]


def test_an_error_in_publishing_is_no_lost_lease(two_ranks, run):
    found = two_ranks.run(SAVED, str(run), "refuse", 0.0)[0]
    assert [kept for kept, *_ in found["kept"]] == [True, False, False]
    assert "no hash of that file" in next(line for line in found["said"] if "SAVE FAILED" in line)
    assert found["folders"] == [1]


def test_a_failed_save_whose_folder_cannot_be_removed_ends_no_run(two_ranks, run):
    """The first attempt leaves the folder; the second finds it there and cannot make its own."""
    found = two_ranks.run(SAVED, str(run), "stay", 0.0)[0]
    assert [kept for kept, *_ in found["kept"]] == [True, False, False]
    assert sum("could not be removed: [Errno 30]" in line for line in found["said"]) == 2
    assert found["left"] == [1] and found["folders"] == [1, 2]


def test_ranks_keep_copies_of_the_same_steps_when_one_writes_slowly(two_ranks, run, tmp_path):
    settings = [f"checkpoint.local_folder={tmp_path}", "checkpoint.local_every_steps=1"]
    job = "resilience.keeper_jobs.copied_by_a_slow_rank"
    assert two_ranks.run(job, str(run), settings, timeout=100) == [1, 1]


@pytest.mark.parametrize("average", [0.9, 0.0], ids=["average", "no average"])
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param([], id="data"),
        pytest.param(["parallel.tensor=2"], id="tensor"),
        pytest.param(["parallel.pipeline=2", "model.tie_embeddings=true"], id="pipeline, tied"),
    ],
)
def test_the_room_asked_for_is_that_of_the_tensors_that_are_written(
    two_ranks, run, layout, average
):
    settings = [*layout, f"optimizer.ema_decay={average}"]
    found = two_ranks.run(START, str(run), settings, 0, [])
    written = sum(tensor.nbytes for reply in found for tensor in reply["state"])
    assert [reply["stored_bytes"] for reply in found] == [written] * 2
    shutil.rmtree(run)
    room = {"free_bytes": 1.11 * written}
    assert "error" not in two_ranks.run(START, str(run), settings, 0, [], *of(**room))[0]
    shutil.rmtree(run)
    room = {"free_bytes": 1.09 * written}
    for reply in two_ranks.run(START, str(run), settings, 0, [], *of(**room)):
        assert "no room for a checkpoint of step 0: " in reply["error"]
        assert "free space there" in reply["error"] and "goes on" not in reply["error"]


def of(tokenizer="its hash", free_bytes=np.inf):
    return -1, False, tokenizer, free_bytes


def test_a_finished_run_asks_for_no_room(one_rank, run):
    one_rank.run(START, str(run), ["train.steps=2"], 2, [2])
    full = of(free_bytes=0)
    assert one_rank.run(START, str(run), ["train.steps=2"], 2, [], *full)[0]["first"] == 2
    assert "no room" in one_rank.run(START, str(run), ["train.steps=3"], 3, [], *full)[0]["error"]


def test_weights_of_another_tokenizer_start_no_run(one_rank, run, tmp_path):
    given = tmp_path / "given"
    one_rank.run(START, str(given), [], 1, [1])
    settings = [f"checkpoint.init_from={given}"]
    found = one_rank.run(START, str(run), settings, 0, [], *of(tokenizer="another"))[0]
    assert "with another tokenizer (sha256 its hash) than the data" in found["error"]
    assert "(another)" in found["error"] and "data prepare --tokenizer" in found["error"]
    assert "error" not in one_rank.run(START, str(run), settings, 0, [])[0]
