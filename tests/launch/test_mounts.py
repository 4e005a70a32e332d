"""What a container must see of a run's data and checkpoints."""

from pathlib import Path

import pytest

from megatron_eso.config.schema import (
    CheckpointConfig,
    DataConfig,
    DataSourceConfig,
    RunConfig,
)
from megatron_eso.errors import ClusterError
from megatron_eso.launch.mounts import mounts_of

SEEN = [Path("/shared/run"), Path("/home/me")]


def run(*paths, validation=None, **checkpoint):
    data = DataConfig([DataSourceConfig(path) for path in paths], validation or {})
    return RunConfig(data=data, checkpoint=CheckpointConfig(**checkpoint))


def test_a_data_set_is_mounted_with_the_tokenizer_beside_its_splits():
    config = run("/data/web/train", "/data/code/train", "s3://b/train",
                 validation={"web": "/data/web/validation"}, init_from="/other/step_5")  # fmt: skip
    found = mounts_of([config, run("/data/more/train")], [], SEEN)
    folders = ["/data/web", "/data/code", "/other/step_5", "/data/more"]
    assert found == [f"{folder}:{folder}" for folder in folders]


def test_what_is_seen_already_is_not_mounted_again():
    config = run("/home/me/data/train", "/lustre/train", "/top", init_from="/shared/run/step_1")
    assert mounts_of([config], ["/mnt/lustre:/lustre", "/top"], SEEN) == []


def test_a_relative_path_starts_in_the_submit_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mounts_of([run("runs/data/train")], [], [tmp_path]) == []


def test_a_folder_of_the_node_must_be_mounted_by_the_profile():
    config = run(local_folder="/ssd/copies")
    with pytest.raises(
        ClusterError, match=r"checkpoint.local_folder=/ssd/copies .*container.mounts"
    ):
        mounts_of([config], [], SEEN)
    assert mounts_of([config], ["/ssd:/ssd"], SEEN) == []
    assert mounts_of([run(local_folder="/dev/shm")], [], SEEN) == []


def test_a_name_that_cannot_be_mounted_is_refused():
    with pytest.raises(ClusterError, match="separate the mounts"):
        mounts_of([run("/data/a,b/train")], [], SEEN)
