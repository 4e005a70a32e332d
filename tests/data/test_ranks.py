"""Eight processes in TP2 x PP2 x DP2: every replica gets its rows, and one rank's fault is everyone's."""

import shutil
from contextlib import closing

import numpy as np
import pytest

from megatron_eso.config.schema import DataConfig, DataSourceConfig
from megatron_eso.data.reader import RowReader
from tests.data.conftest import SEQUENCE_LENGTH, VOCAB_SIZE, in_small_shards
from tests.data.object_store import environment
from tests.data.rank_jobs import BATCH
from tests.rank_pool import RankPool

pytestmark = pytest.mark.slow

LAYOUT = ["parallel.tensor=2", "parallel.pipeline=2"]
LEADER = 2  # the first rank of the second replica, ranks 2, 3, 6 and 7


@pytest.fixture(scope="module")
def eight_ranks():
    pool = RankPool(8)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def split(prepared, tmp_path_factory):
    """Return a train split of several shards."""
    folder = tmp_path_factory.mktemp("ranks") / "set"
    shutil.copytree(prepared, folder)
    in_small_shards(folder / "train", shard_bytes=2500)
    return folder / "train"


@pytest.fixture
def damaged(split, tmp_path):
    """Return a copy of the split, the name of the shard to damage, and a step that needs it."""
    shutil.copytree(split.parent, tmp_path / "set")
    with alone(split) as reader:
        shards = [shards_of(reader, step) for step in range(100)]
    first = shards[0]
    step = next(n for n, found in enumerate(shards) if found - first)
    number = min(shards[step] - first)
    return tmp_path / "set" / "train", f"shard.{number:05d}.mds", step


def alone(split) -> closing[RowReader]:
    """Return a reader of one process with the ranks' settings."""
    data = DataConfig(sources=[DataSourceConfig(str(split))], num_workers=0)
    return closing(
        RowReader(
            data, sequence_length=SEQUENCE_LENGTH, vocab_size=VOCAB_SIZE,
            global_batch_rows=BATCH, seed=3,
        )
    )  # fmt: skip


def shards_of(reader: RowReader, step: int) -> set[int]:
    """Return the shards that the rows of a step stand in."""
    samples = [sample for _, sample in reader.samples_of(step, range(BATCH))]
    sizes = reader._splits[0].shard_sizes
    return set((np.searchsorted(np.cumsum(sizes), samples, side="right")).tolist())


def source(address, **settings) -> list[str]:
    data = [f"data.{name}={value}" for name, value in settings.items()]
    return [*LAYOUT, f"data.sources=[{{path: '{address}'}}]", *data]


def assert_rows_are_those_of_one_process(replies, split, steps) -> None:
    with alone(split) as reader:
        for step in steps:
            expected = reader.read(step, range(BATCH))
            seen = np.zeros(BATCH, int)
            for reply in replies:
                tokens, is_valid = reply["steps"][step]
                assert np.array_equal(tokens, expected.tokens[reply["rows"]])
                assert np.array_equal(is_valid, expected.is_valid[reply["rows"]])
                seen[reply["rows"]] += 1
            assert (seen == 4).all()  # every row on the four ranks of one replica


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_rank_gets_the_rows_of_its_replica_over_two_epochs(eight_ranks, split, num_workers):
    with alone(split) as reader:
        epoch = reader.manifests[0].num_samples // BATCH
    steps = [0, 1, 2, epoch - 1, epoch, epoch + 1, 2 * epoch - 1]
    settings = source(split, num_workers=num_workers)
    replies = eight_ranks.run("data.rank_jobs.read_steps", settings, steps)
    assert sorted(reply["data_rank"] for reply in replies) == [0] * 4 + [1] * 4
    assert_rows_are_those_of_one_process(replies, split, steps)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda path: path.unlink(), "No such file", id="missing"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-3]), "bytes", id="short"),
        pytest.param(
            lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\xee"), "damaged", id="changed"
        ),
    ],
)
def test_a_damaged_shard_on_one_ranks_disk_is_an_error_on_all_that_names_it(
    eight_ranks, split, damaged, damage, message
):
    own, name, step = damaged
    damage(own / name)
    replies = eight_ranks.run(
        "data.rank_jobs.read_steps", source(split), list(range(100)), {LEADER: source(own)},
        timeout=120.0,
    )  # fmt: skip
    errors = {reply["error"] for reply in replies}
    assert len(errors) == 1
    assert f"rank {LEADER}: shard {own}/{name}" in errors.pop()
    assert len({len(reply["steps"]) for reply in replies}) == 1
    assert len(replies[0]["steps"]) >= step
    assert_rows_are_those_of_one_process(replies, split, replies[0]["steps"])


@pytest.mark.parametrize("fault", ["404", "503", "stall"])
def test_a_shard_the_store_does_not_give_is_an_error_on_all(
    eight_ranks, store, split, tmp_path, fault
):
    address = store.upload(split.parent, f"ranks-{fault}") + "/train"
    name = "shard.00001.mds"
    store.faults = {f"ranks-{fault}/train/{name}": [f"{fault}!"]}
    settings = source(address, cache_dir=tmp_path, retries=2, timeout_seconds=2.0)
    replies = eight_ranks.run(
        "data.rank_jobs.read_steps", settings, list(range(100)), {}, environment(store),
        timeout=180.0,
    )  # fmt: skip
    store.faults = {}
    for reply in replies:
        assert f"{address}/{name} could not be fetched" in reply["error"]
    assert_rows_are_those_of_one_process(replies, split, replies[0]["steps"])


def test_passing_faults_of_the_store_are_healed_with_the_right_rows(
    eight_ranks, store, split, tmp_path
):
    address = store.upload(split.parent, "ranks-healed") + "/train"
    faults = ["503", "flip", "cut", "short", "trickle"]
    store.faults = {
        f"ranks-healed/train/shard.{number:05d}.mds": [fault] for number, fault in enumerate(faults)
    }
    steps = list(range(0, 40, 4))
    settings = source(address, cache_dir=tmp_path, timeout_seconds=5.0)
    replies = eight_ranks.run(
        "data.rank_jobs.read_steps", settings, steps, {}, environment(store), timeout=240.0
    )
    assert_rows_are_those_of_one_process(replies, split, steps)
    assert any(not left for left in store.faults.values())
    store.faults = {}


def test_a_source_that_one_rank_cannot_open_is_an_error_on_all(eight_ranks, split, tmp_path):
    replies = eight_ranks.run(
        "data.rank_jobs.read_steps", source(split), [0], {5: source(tmp_path / "gone")},
        timeout=120.0,
    )  # fmt: skip
    message = f"rank 5: data.sources[0].path: data folder {tmp_path}/gone does not exist"
    assert all(reply["error"].startswith(message) for reply in replies)


def test_a_source_that_no_rank_can_open_is_said_once(eight_ranks, tmp_path):
    replies = eight_ranks.run("data.rank_jobs.read_steps", source(tmp_path / "gone"), [0])
    assert all(reply["error"].count("does not exist") == 1 for reply in replies)
    assert all(reply["error"].startswith("data.sources[0].path: data folder") for reply in replies)


def test_a_training_run_ends_on_all_ranks_with_the_name_of_the_shard(
    eight_ranks, split, damaged, tmp_path
):
    own, name, _ = damaged
    (own / name).unlink()
    common = [f"folder={tmp_path / 'run'}", "train.log_every_steps=1"]
    replies = eight_ranks.run(
        "data.rank_jobs.run", [*source(split), *common], {LEADER: [*source(own), *common]},
        timeout=240.0,
    )  # fmt: skip
    for error, has_trained in replies:
        assert f"rank {LEADER}: shard {own}/{name}" in error
        assert has_trained


def test_a_rank_whose_folder_holds_other_data_is_an_error_on_all(eight_ranks, split, tmp_path):
    """A path on each node's own disk: each rank would read its share of another data set."""
    common = ["train.steps=1", f"folder={tmp_path / 'run'}"]
    other = source(split.with_name("validation"))
    replies = eight_ranks.run(
        "data.rank_jobs.run", [*source(split), *common], {LEADER: [*other, *common]}
    )
    for error, has_trained in replies:
        assert error.startswith(f"rank {LEADER}: data.sources") and "data.sources, order" in error
        assert not has_trained
