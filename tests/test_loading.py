"""Loading: nothing that a checkpoint's files name is run; if one rank cannot read, all end alike."""

import json
import os
import pickle

import pytest
import torch

from megatron_eso.checkpoint.folder import folder_of_step, hash_file
from tests.resilience.keeper_jobs import START

pytestmark = pytest.mark.slow
TENSOR = ["parallel.tensor=2"]


class Hostile:
    """An object whose pickle creates a folder when it is loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def trace(tmp_path):
    """Yield the folder that a hostile pickle creates if run; in the end it is absent, but could be made."""
    folder = tmp_path / "it_ran"
    yield folder
    assert not folder.exists()
    pickle.loads(pickle.dumps(Hostile(folder)))
    assert folder.is_dir()


@pytest.fixture
def saved(two_ranks, tmp_path):
    """Return a run of two tensor-parallel ranks with checkpoints of steps 1 and 2."""
    run = tmp_path / "run"
    two_ranks.run(START, str(run), TENSOR, 2, [1, 2])
    return run


def checkpoint(run, step=2):
    return folder_of_step(run / "checkpoints", step)


@pytest.mark.parametrize("file", [".metadata", "common.pt"])
def test_a_hostile_pickle_in_a_checkpoint_is_not_run(two_ranks, saved, trace, file):
    """Hashes cannot tell: whoever wrote the files also wrote the manifest."""
    folder = checkpoint(saved)
    if file == ".metadata":
        (folder.path / file).write_bytes(pickle.dumps(Hostile(trace)))
    else:
        torch.save(Hostile(trace), folder.path / file)
    folder.commit()
    begun = [*TENSOR, f"checkpoint.init_from={folder.path}"]
    resumed = two_ranks.run(START, str(saved), TENSOR, 3, [])
    other = two_ranks.run(START, str(saved / "other"), begun, 1, [])
    for found in (*resumed, *other):
        if file == ".metadata":
            assert f"{folder.path}/.metadata: its pickle names posix.mkdir" in found["error"]
            assert "was not run" in found["error"]
        else:  # no one reads it
            assert "error" not in found


def test_a_hostile_pickle_in_a_node_local_copy_is_not_run(two_ranks, saved, tmp_path, trace):
    settings = [*TENSOR, f"checkpoint.local_folder={tmp_path}", "checkpoint.local_every_steps=1"]
    two_ranks.run(START, str(saved), settings, 3, [])
    (copy,) = tmp_path.glob("megatron-eso-*/rank_00001/step_0000000003.pt")
    torch.save(Hostile(trace), copy)
    header = json.loads(copy.with_suffix(".json").read_text())
    header |= {"bytes": copy.stat().st_size, "xxh3_128": hash_file(copy)}
    copy.with_suffix(".json").write_text(json.dumps(header))
    for found in two_ranks.run(START, str(saved), settings, 4, [], timeout=60):
        assert found["first"] == 2


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "file", ["esolm.json", ".metadata", "metadata.json", "common.pt", ".distcp"]
)
def test_a_file_that_one_rank_cannot_read_ends_all_ranks_alike(two_ranks, saved, file, rank):
    arguments = str(saved), [*TENSOR, "checkpoint.verify_hashes=false"]
    replies = two_ranks.run(
        "resilience.keeper_jobs.start_without", rank, file, *arguments, timeout=60
    )
    first, second = replies
    if "error" not in first:  # a file that this rank does not need
        assert file in ("metadata.json", "common.pt") or (file, rank) == ("esolm.json", 1)
        assert first["first"] == second["first"] == 2
        return
    assert first["error"] == second["error"]
    assert file in first["error"] and "Input/output error" in first["error"]
    assert "Traceback" not in first["error"]


def test_a_local_copy_that_one_rank_cannot_read_is_used_by_none(two_ranks, saved, tmp_path):
    settings = [*TENSOR, f"checkpoint.local_folder={tmp_path}", "checkpoint.local_every_steps=1"]
    two_ranks.run(START, str(saved), settings, 3, [])
    job = "resilience.keeper_jobs.start_without"
    # The file is whole when the ranks agree on it; it fails when it is opened again.
    for found in two_ranks.run(job, 1, "000003.pt", str(saved), settings, 1, timeout=60):
        assert found["first"] == 2


def test_ranks_that_evaluate_a_running_run_load_the_same_checkpoint(two_ranks, saved):
    """A new checkpoint may be committed while they look; halves of two checkpoints make no model."""
    found = two_ranks.run(
        "resilience.keeper_jobs.loaded_for_evaluation", str(saved), 1, timeout=100
    )
    assert found == [checkpoint(saved).path.name] * 2
