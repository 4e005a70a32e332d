"""Checkpoints: bitwise at the same layout, equal at any other, and damage is noticed."""

import json
import shutil
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
from typer.testing import CliRunner

from megatron_eso.checkpoint.compare import compare
from megatron_eso.checkpoint.find import find_checkpoint, newest_valid
from megatron_eso.checkpoint.folder import (
    CheckpointFolder,
    folder_of_step,
    list_folders,
    prune,
    set_aside_beyond,
)
from megatron_eso.checkpoint.load import require_same_model
from megatron_eso.cli.checkpoint import app
from megatron_eso.config.derive import ffn_size
from megatron_eso.config.schema import ModelConfig
from megatron_eso.errors import CheckpointError
from tests.rank_jobs import assemble

pytestmark = pytest.mark.slow

LAYOUTS = {
    "tensor": ["parallel.tensor=2"],
    "pipeline": ["parallel.pipeline=2"],
    "interleaved": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    "context": ["parallel.context=2"],
    "data": ["model.num_layers=3"],  # with four, no parameter is split between the two ranks
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_ten_steps_equal_five_and_a_resume_bitwise(two_ranks, tmp_path, layout, dtype):
    settings = [*LAYOUTS[layout], f"precision.dtype={dtype}", "model.dropout=0.1"]
    whole = two_ranks.run("train", settings, 10, str(tmp_path), 5)
    again = two_ranks.run("train", settings, 10, str(tmp_path), None, True)
    for first, second in zip(whole, again, strict=True):
        assert first["losses"][5:] == second["losses"]
        assert first["state"].keys() == second["state"].keys()
        for name, value in first["state"].items():
            assert np.array_equal(value, second["state"][name]), name


def test_a_checkpoint_continues_for_twenty_steps_at_any_layout(one_rank, two_ranks, tmp_path):
    """Rows, times, masks and orders are the same on any rank; only sums are rounded differently."""
    # Steps as large as in training: larger ones turn rounding into a difference that grows.
    common = ["train.steps=30", "optimizer.learning_rate=0.001"]
    whole = two_ranks.run("train", [*common, *LAYOUTS["tensor"]], 25, str(tmp_path), 5)
    losses = whole[0]["losses"][5:]
    assert len(losses) == 20 and len(set(losses)) == 20
    expected = assemble([reply["weights"] for reply in whole])
    others = [
        (two_ranks, LAYOUTS["pipeline"]),
        (two_ranks, LAYOUTS["interleaved"]),
        (two_ranks, LAYOUTS["context"]),
        (two_ranks, ["train.micro_batch_rows=2"]),  # two data-parallel ranks
        (one_rank, ["train.micro_batch_rows=8"]),
    ]
    for ranks, settings in others:
        replies = ranks.run("train", [*common, *settings], 25, str(tmp_path), None, True)
        np.testing.assert_allclose(replies[0]["losses"], losses, rtol=1e-6, err_msg=str(settings))
        found = assemble([reply["weights"] for reply in replies])
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, atol=2e-4, err_msg=key)


def test_a_checkpoint_of_context_ranks_continues_without_them(one_rank, two_ranks, tmp_path):
    whole = two_ranks.run("train", LAYOUTS["context"], 8, str(tmp_path), 5)
    alone = one_rank.run("train", [], 8, str(tmp_path), None, True)
    np.testing.assert_allclose(alone[0]["losses"], whole[0]["losses"][5:], rtol=1e-6)


def test_data_parallel_ranks_read_each_tensor_once_between_them(one_rank, two_ranks, tmp_path):
    one_rank.run("train", [], 2, str(tmp_path), 2)
    (alone,) = one_rank.run("read_of_resume", str(tmp_path), -1)
    first, second = two_ranks.run("read_of_resume", str(tmp_path), -1)
    assert first["read"] and second["read"]
    assert sorted(first["read"] + second["read"]) == sorted(alone["read"])
    assert len(alone["read"]) == len(set(alone["read"]))


def test_what_one_rank_cannot_read_is_an_error_of_all(two_ranks, tmp_path):
    two_ranks.run("train", [], 2, str(tmp_path), 2)
    replies = two_ranks.run("read_of_resume", str(tmp_path), 1)
    assert [reply["failure"] for reply in replies] == ["rank 1: it read a damaged file"] * 2


def test_damage_is_found_and_the_older_checkpoint_used(one_rank, tmp_path):
    one_rank.run("train", [], 2, str(tmp_path), 2)
    one_rank.run("train", ["checkpoint.asynchronous=false"], 4, str(tmp_path), 4)
    old, new = list_folders(tmp_path)
    assert newest_valid(tmp_path, hashes=True) == new
    shard = next(new.path.glob("*.distcp"))
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    assert new.damage(hashes=False) == ""  # only the hash can tell
    assert "another hash" in new.damage(hashes=True)
    assert newest_valid(tmp_path, hashes=True) == old
    shard.write_bytes(raw[:-1])
    assert "bytes instead of" in new.damage(hashes=False)
    shard.unlink()
    assert "is missing" in new.damage(hashes=False)
    (new.path / "COMMITTED").unlink()
    assert "never committed" in new.damage(hashes=False)
    assert newest_valid(tmp_path, hashes=False) == old


def test_ranks_hash_a_checkpoint_once_between_them_and_agree(two_ranks, tmp_path):
    two_ranks.run("train", ["parallel.tensor=2"], 1, str(tmp_path), 1)
    two_ranks.run("train", ["parallel.tensor=2"], 2, str(tmp_path), 2)
    old, new = list_folders(tmp_path)
    files = sorted(f"{new.path.name}/{name}" for name in new.hashes())
    for named, path in ((False, tmp_path), (True, tmp_path), (True, new.path)):
        replies = two_ranks.run("found_together", str(path), named)
        assert [reply["found"] for reply in replies] == [str(new.path)] * 2
        assert sorted(replies[0]["hashed"] + replies[1]["hashed"]) == files
        assert all(reply["hashed"] and not reply["said"] for reply in replies)

    shard = new.path / list(new.hashes())[1]  # the second rank's share
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    first, second = two_ranks.run("found_together", str(tmp_path), False)
    assert first["found"] == second["found"] == str(old.path)
    assert (
        "passed over" in first["said"][0] and f"{shard.name} has another hash" in first["said"][0]
    )
    assert second["said"] == []
    for reply in two_ranks.run("found_together", str(new.path), True):
        assert f"cannot be used: {shard.name} has another hash" in reply["found"]
    for reply in two_ranks.run("found_together", str(tmp_path / "none"), True):
        assert reply["found"] == f"{tmp_path}/none does not exist"


def make(root, step, *, committed=True):
    folder = folder_of_step(root, step)
    folder.path.mkdir(parents=True)
    (folder.path / "esolm.json").write_text(json.dumps({"step": step, "format_version": 1}))
    if committed:
        folder.commit()
    return folder


@pytest.mark.parametrize(
    "manifest",
    [
        pytest.param([], id="a list"),
        pytest.param(None, id="null"),
        pytest.param({"file": {}}, id="another key"),
        pytest.param({"files": {}}, id="no file"),
        pytest.param({"files": ["esolm.json"]}, id="names alone"),
        pytest.param({"files": {"esolm.json": 37}}, id="sizes alone"),
        pytest.param({"files": {"esolm.json": {"bytes": 37, "hash": "0"}}}, id="a renamed key"),
        pytest.param({"files": {"esolm.json": {"bytes": "37", "xxh3_128": "0"}}}, id="size in words"),
    ],
)  # fmt: skip
def test_a_manifest_of_another_shape_is_damage_and_the_older_checkpoint_used(tmp_path, manifest):
    for step in (10, 20):
        make(tmp_path, step)
    new = folder_of_step(tmp_path, 20)
    (new.path / "MANIFEST.json").write_text(json.dumps(manifest))
    assert newest_valid(tmp_path, hashes=True) == folder_of_step(tmp_path, 10)
    verified = CliRunner().invoke(app, ["verify", str(new.path)])
    assert verified.exit_code == 4 and "DAMAGED: its MANIFEST.json cannot be" in verified.output


def test_a_sidecar_that_is_no_object_is_damaged(tmp_path):
    folder = make(tmp_path, 1)
    (folder.path / "esolm.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds no object"):
        folder.sidecar()


def test_a_file_is_no_checkpoint(tmp_path):
    (tmp_path / "c.yaml").touch()
    with pytest.raises(CheckpointError, match=r"c.yaml is a file; give a checkpoint folder"):
        find_checkpoint(tmp_path / "c.yaml")


def test_retention_keeps_the_newest_and_the_milestones(tmp_path):
    for step in range(10, 80, 10):
        make(tmp_path, step, committed=step != 40)
    for step in (65, 90):
        make(tmp_path, step, committed=False)
    prune(tmp_path, keep_last=2, keep_every_steps=30)
    left = [(f.step, f.is_committed) for f in list_folders(tmp_path)]
    assert left == [(30, True), (60, True), (70, True), (90, False)]


def test_retention_counts_whole_checkpoints_alone(tmp_path):
    for step in (10, 20, 30, 40, 50):
        make(tmp_path, step)
    for step in (30, 50):
        (folder_of_step(tmp_path, step).path / "esolm.json").unlink()
    prune(tmp_path, keep_last=2, keep_every_steps=None)
    assert [f.step for f in list_folders(tmp_path)] == [20, 30, 40, 50]
    prune(tmp_path, keep_last=1, keep_every_steps=None)
    assert [f.step for f in list_folders(tmp_path)] == [40, 50]
    (folder_of_step(tmp_path, 40).path / "esolm.json").unlink()
    make(tmp_path, 60)
    prune(tmp_path, keep_last=2, keep_every_steps=None)  # too few are whole to give up any
    assert [f.step for f in list_folders(tmp_path)] == [40, 50, 60]


def test_a_checkpoint_just_saved_is_kept_whatever_lies_beyond_it(tmp_path):
    for step in (10, 20, 80, 90):
        make(tmp_path, step)
    prune(tmp_path, keep_last=1, keep_every_steps=None, up_to=20)
    assert [f.step for f in list_folders(tmp_path)] == [20, 80, 90]


@pytest.mark.parametrize("hashes", [True, False])
def test_pruning_by_hand_keeps_what_is_whole_by_its_hashes(tmp_path, hashes, monkeypatch):
    for step in (10, 20):
        make(tmp_path, step)
    changed = folder_of_step(tmp_path, 20).path / "esolm.json"
    changed.write_text(changed.read_text().replace("20", "21"))
    words = ["prune", str(tmp_path), "--keep-last", "1", *(() if hashes else ["--no-hashes"])]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert [f.step for f in list_folders(tmp_path)] == ([10, 20] if hashes else [20])
    monkeypatch.setitem(sys.modules, "xxhash", None)  # as on a login node
    asked = CliRunner().invoke(app, words)
    assert ("--no-hashes" in str(asked.exception)) is hashes


def test_a_checkpoint_that_cannot_be_removed_is_not_said_to_be(tmp_path, monkeypatch):
    for step in (10, 20):
        make(tmp_path, step)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as of another user's files
    asked = CliRunner().invoke(app, ["prune", str(tmp_path), "--keep-last", "1"])
    assert isinstance(asked.exception, CheckpointError) and "removed" not in asked.output
    assert "step_0000000010 cannot be removed" in str(asked.exception)


def test_a_checkpoint_that_was_set_aside_counts_again_under_its_old_name(tmp_path):
    for step in (10, 20, 30):
        make(tmp_path, step)
    assert [f.step for f in set_aside_beyond(tmp_path, 10)] == [20, 30]
    assert newest_valid(tmp_path, hashes=True) == folder_of_step(tmp_path, 10)
    other = folder_of_step(tmp_path, 30)
    assert "rename its SET_ASIDE to COMMITTED" in other.damage(hashes=False)
    prune(tmp_path, keep_last=1, keep_every_steps=None)
    assert [f.step for f in list_folders(tmp_path)] == [10, 20, 30]
    (other.path / "SET_ASIDE").rename(other.path / "COMMITTED")
    assert newest_valid(tmp_path, hashes=True) == other


def test_a_newer_format_is_refused_with_advice(tmp_path):
    folder = make(tmp_path, 1)
    (folder.path / "esolm.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(Exception, match="update megatron-eso"):
        CheckpointFolder(folder.path).sidecar()


def test_compare_finds_what_differs_across_layouts(two_ranks, tmp_path):
    for name, settings in (("tensor", ["parallel.tensor=2"]), ("data", [])):
        two_ranks.run("train", settings, 2, str(tmp_path / name), 2)
    one, other = (list_folders(tmp_path / name)[0] for name in ("tensor", "data"))
    assert all(d.is_bitwise_equal and d.num_tensors > 5 for d in compare(one, one))
    found = {d.group: d for d in compare(one, other)}
    assert set(found) == {"weights", "exp_avg", "exp_avg_sq", "ema"}
    assert 0 < found["weights"].largest < 2e-4  # only rounding, because the sums differ
    two_ranks.run("train", ["model.num_layers=6"], 2, str(tmp_path / "deep"), 2)
    with pytest.raises(CheckpointError, match="different models"):
        compare(one, list_folders(tmp_path / "deep")[0])


def test_a_fresh_run_in_bf16_starts_from_masters_that_are_not_rounded(one_rank):
    whole, rounded = (
        one_rank.run("started", [f"precision.dtype={dtype}"])[0] for dtype in ("fp32", "bf16")
    )
    assert any(not np.array_equal(whole["model"][i], rounded["model"][i]) for i in whole["model"])
    for kind in ("masters", "average"):
        for number, value in whole[kind].items():
            np.testing.assert_array_equal(rounded[kind][number], value, err_msg=kind)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_data_parallel_ranks_draw_the_weights_that_one_draws(one_rank, two_ranks, dtype):
    settings = [*LAYOUTS["data"], f"precision.dtype={dtype}"]
    assert_same_start(one_rank.run("started", settings)[0], two_ranks.run("started", settings))


def test_data_parallel_ranks_start_from_the_same_weights_as_one(one_rank, two_ranks, tmp_path):
    layers = LAYOUTS["data"]
    one_rank.run("train", layers, 3, str(tmp_path), 3)
    (alone,) = one_rank.run("started_from", layers, str(tmp_path))
    assert_same_start(alone, two_ranks.run("started_from", layers, str(tmp_path)))


def assert_same_start(alone, both):
    assert set(both[0]["masters"]) & set(both[1]["masters"])  # a parameter is split
    for number, value in alone["model"].items():
        for reply in both:
            np.testing.assert_array_equal(reply["model"][number], value)
    for kind in ("masters", "average"):
        parts = [part[kind] for part in both]
        for number, value in alone[kind].items():
            joined = np.concatenate([part[number].ravel() for part in parts if number in part])
            np.testing.assert_array_equal(joined, value.ravel())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_starts_from_the_averaged_weights_in_float32(one_rank, tmp_path, dtype):
    """The masters are not the model's rounded weights, and the average is not the random ones."""
    saved = one_rank.run("train", [], 3, str(tmp_path), 3)[0]["state"]
    stored = {key: value for key, value in saved.items() if key.startswith("ema.")}
    assert stored
    found = one_rank.run("started_from", [f"precision.dtype={dtype}"], str(tmp_path))[0]
    expected = np.sort(np.concatenate([value.ravel() for value in stored.values()]))
    for kind in ("masters", "average"):
        values = np.sort(np.concatenate([value.ravel() for value in found[kind].values()]))
        np.testing.assert_array_equal(values, expected, err_msg=kind)
    for number, value in found["model"].items():
        rounding = 0.0 if dtype == "fp32" else 2**-8
        np.testing.assert_allclose(value, found["masters"][number], rtol=rounding, atol=0)


def test_a_model_is_the_same_whether_a_size_is_said_or_follows(tmp_path):
    """An imported checkpoint states its sizes; a configuration may let them follow from others."""
    model = ModelConfig(hidden_size=64, num_layers=2, num_heads=4, vocab_size=300)
    stored = {**asdict(model), "num_kv_heads": 4, "head_size": 16, "ffn_size": ffn_size(model)}
    require_same_model(tmp_path, {"model": stored}, model)
    with pytest.raises(CheckpointError, match=r"model.num_kv_heads: checkpoint 4, configuration 2"):
        require_same_model(tmp_path, {"model": stored}, replace(model, num_kv_heads=2))
