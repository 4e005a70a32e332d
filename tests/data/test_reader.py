"""The reader: rows by (step, row) alone, whoever reads which and with how many threads."""

import contextlib
import multiprocessing
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_eso.config.schema import DataConfig, DataSourceConfig
from megatron_eso.data.fork_lock import _all_locks
from megatron_eso.data.plan_reads import ROWS_OF_BLOCK
from megatron_eso.data.reader import RowReader, ValidationReader
from megatron_eso.data.shards import ShardedRows
from megatron_eso.data.store import LocalStore
from megatron_eso.errors import DataError
from tests.data.conftest import SEQUENCE_LENGTH, VOCAB_SIZE, in_small_shards

BATCH = 8
ROOT = Path(__file__).parents[2]


def reader(
    *paths,
    num_workers=0,
    batch=BATCH,
    seed=3,
    length=SEQUENCE_LENGTH,
    vocab=VOCAB_SIZE,
    shuffle=True,
):
    sources = [DataSourceConfig(str(path), weight) for path, weight in paths]
    data = DataConfig(sources=sources, num_workers=num_workers, shuffle=shuffle)
    return RowReader(
        data, sequence_length=length, vocab_size=vocab, global_batch_rows=batch, seed=seed
    )


def test_an_epoch_reads_every_row_once_across_step_boundaries(prepared):
    rows = reader((prepared / "train", 1))
    total = rows.manifests[0].num_samples
    samples = [pair[1] for step in range(total) for pair in rows.samples_of(step, range(BATCH))]
    assert set(Counter(samples).values()) == {BATCH}
    assert sorted(samples[:total]) == list(range(total))


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_every_world_size_and_worker_count_reads_the_same_rows(prepared, world, num_workers):
    whole = reader((prepared / "train", 1))
    ranks = [reader((prepared / "train", 1), num_workers=num_workers) for _ in range(world)]
    share = BATCH // world
    for step in [*range(4), 300, 301]:
        expected = whole.read(step, range(BATCH))
        for rank, own in enumerate(ranks):
            mine = range(rank * share, (rank + 1) * share)
            got = own.read(step, mine)
            assert np.array_equal(got.tokens, expected.tokens[list(mine)])
            assert np.array_equal(got.is_valid, expected.is_valid[list(mine)])
    for own in ranks:
        own.close()


def test_example_rows_come_from_a_few_shards_spread_over_the_sources(
    prepared, tmp_path, monkeypatch
):
    whole = reader((prepared / "train", 1))
    folders = []
    for name in ("a", "b"):
        folders.append(shutil.copytree(prepared / "train", tmp_path / name))
        in_small_shards(folders[-1], shard_bytes=2500)
    mixed = reader((folders[0], 3), (folders[1], 1))
    opened = []
    for number, split in enumerate(mixed._splits):
        original = split._shard
        monkeypatch.setattr(
            split,
            "_shard",
            lambda shard, number=number, original=original: (
                opened.append((number, shard)) or original(shard)
            ),
        )
    rows = mixed.example_rows(80, num_shards=8)
    last = len(mixed._splits[0].shard_sizes) - 1
    assert last > 8 and {shard for number, shard in opened if number == 0} >= {0, last}
    assert Counter(number for number, _ in set(opened)) == {0: 6, 1: 2}
    assert rows.tokens.shape == rows.is_valid.shape == (60 + 20, SEQUENCE_LENGTH + 1)
    stored = {
        row.tobytes() for row in whole._splits[0].read(np.arange(whole._splits[0].num_samples))
    }
    dtype = np.dtype(whole.manifests[0].dtype)
    assert {row.astype(dtype).tobytes() for row in rows.tokens[rows.is_valid.all(1)]} <= stored
    # More than the data have: all that the shards hold, each row once.
    small = reader((folders[0], 1)).example_rows(10**6, num_shards=10**6)
    assert len(small.tokens) == whole.manifests[0].num_samples


def test_reading_starts_anywhere_with_the_step_alone(prepared):
    first = reader((prepared / "train", 1))
    passed = [first.read(step, range(BATCH)).tokens for step in range(12)]
    resumed = reader((prepared / "train", 1), num_workers=1)
    for step in range(7, 12):
        assert np.array_equal(resumed.read(step, range(BATCH)).tokens, passed[step])
    resumed.close()


def test_padding_is_marked_and_never_shows_the_mask_token(prepared):
    rows = reader((prepared / "train", 1))
    total = rows.manifests[0].num_samples
    padded = [rows.read(step, range(BATCH)) for step in range(total // BATCH + 1)]
    tokens = np.concatenate([read.tokens for read in padded])
    valid = np.concatenate([read.is_valid for read in padded])
    assert not valid.all()
    assert tokens.max() < VOCAB_SIZE - 1
    assert (tokens[~valid] == rows.manifests[0].end_of_document_id).all()


def test_a_mixture_reads_each_source_by_its_weight(prepared):
    rows = reader((prepared / "train", 3), (prepared / "validation", 1))
    pairs = [pair for step in range(100) for pair in rows.samples_of(step, range(BATCH))]
    counts = Counter(source for source, _ in pairs)
    assert abs(counts[0] - 600) <= 1


@pytest.fixture(scope="module")
def many_shards(prepared, tmp_path_factory):
    """Return the data set again, in many shards."""
    folder = tmp_path_factory.mktemp("many") / "set"
    shutil.copytree(prepared, folder)
    for split in ("train", "validation"):
        in_small_shards(folder / split, shard_bytes=2500)
    return folder


@pytest.mark.parametrize("splits", [("train",), ("train", "validation")], ids=["one", "mixture"])
@pytest.mark.parametrize("wanted", [range(BATCH), (6, 1), ()], ids=["all", "some", "none"])
def test_the_rows_of_any_step_are_the_samples_that_the_order_names(many_shards, splits, wanted):
    """Reads are planned for blocks of steps: the steps beside a block's ends, and far ones."""
    rows = reader(*((many_shards / split, number + 1) for number, split in enumerate(splits)))
    written = [
        ValidationReader(
            many_shards / split, sequence_length=SEQUENCE_LENGTH, vocab_size=VOCAB_SIZE
        )
        for split in splits
    ]
    block = ROWS_OF_BLOCK // max(len(wanted), 1)
    for step in (0, block - 1, block, 2 * block - 1, 5, 10**9):
        read = rows.read(step, wanted)
        named = rows.samples_of(step, wanted)
        assert len(read.tokens) == len(named) == len(wanted)
        for row, (source, sample) in enumerate(named):
            expected = written[source].read([sample])
            assert np.array_equal(read.tokens[row], expected.tokens[0])
            assert np.array_equal(read.is_valid[row], expected.is_valid[0])


def test_shards_of_a_shuffle_are_fetched_before_their_first_row_is_read(many_shards, monkeypatch):
    """The next places touch a window of shards, of which nearly all are open already."""
    ahead, warming, original = [], threading.local(), ShardedRows.warm

    def warm(self, *arguments):
        warming.is_on = True
        original(self, *arguments)
        warming.is_on = False

    def noted(self, shard, opening=LocalStore.open):
        ahead.append(getattr(warming, "is_on", False))
        return opening(self, shard)

    monkeypatch.setattr(ShardedRows, "warm", warm)
    monkeypatch.setattr(LocalStore, "open", noted)
    data = DataConfig(
        sources=[DataSourceConfig(str(many_shards / "train"))], shuffle_block_size=512,
        prefetch_shards=8,
    )  # fmt: skip
    rows = RowReader(
        data,
        sequence_length=SEQUENCE_LENGTH,
        vocab_size=VOCAB_SIZE,
        global_batch_rows=BATCH,
        seed=0,
    )
    for step in range(rows.manifests[0].num_samples // BATCH):
        rows.read(step, range(BATCH))
        assert rows._warming is not None
        for future in (rows._warming, *rows._ahead.values()):
            future.result()
    rows.close()
    assert len(ahead) == rows.manifests[0].num_shards > 40
    assert sum(ahead) > 0.8 * len(ahead)


def send_rows(pipe, path, rows=None):
    """Send rows of two steps from a child process, by the parent's reader or by one of its own."""
    rows = rows or reader((path, 1), num_workers=2)
    pipe.send([rows.read(step, range(BATCH)).tokens for step in (3, 4)])
    rows.close()


def test_a_spawned_child_reads_the_same_rows(many_shards):
    rows = reader((many_shards / "train", 1), num_workers=2)
    expected = [rows.read(step, range(BATCH)).tokens for step in (3, 4)]
    rows.close()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=send_rows, args=(theirs, many_shards / "train"))
    child.start()
    assert ours.poll(120)
    assert np.array_equal(ours.recv(), expected)
    child.join(30)
    assert child.exitcode == 0


def read_in_a_fork(path):
    """Compare what a forked child reads with the parent's rows; a thread of the parent holds each lock."""
    rows = reader((path, 1), num_workers=2)
    expected = [rows.read(step, range(BATCH)).tokens for step in (3, 4)]
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=send_rows, args=(theirs, path, rows))
    with contextlib.ExitStack() as held:
        for lock in list(_all_locks()):
            held.enter_context(lock)
        child.start()
    assert ours.poll(60), "the child hangs"
    assert np.array_equal(ours.recv(), expected)
    child.join(30)
    assert child.exitcode == 0
    assert np.array_equal(rows.read(4, range(BATCH)).tokens, expected[1])
    rows.close()


def test_a_forked_child_reads_although_a_thread_of_its_parent_held_the_locks(many_shards):
    """In a process of its own: this one has threads of torch and of other tests."""
    code = "import sys, tests.data.test_reader as t; t.read_in_a_fork(t.Path(sys.argv[1]))"
    command = [sys.executable, "-W", "ignore", "-c", code, str(many_shards / "train")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_rows_once_read_do_not_change_when_others_are(prepared):
    rows = reader((prepared / "train", 1))
    first = rows.read(0, range(BATCH)).tokens
    kept = first.copy()
    rows.read(1, range(BATCH))
    assert np.array_equal(first, kept)


@pytest.mark.parametrize(("step", "wanted"), [(-1, [0]), (0, [BATCH]), (0, [-1])])
def test_rows_and_steps_that_do_not_exist_are_refused(prepared, step, wanted):
    with pytest.raises(ValueError, match="rows are 0 to 7"):
        reader((prepared / "train", 1)).read(step, wanted)


def test_the_fingerprint_tells_data_mixture_seed_and_batch_apart(prepared):
    alone = reader((prepared / "train", 1)).fingerprint()
    assert alone == reader((prepared / "train", 2)).fingerprint()
    others = [
        reader((prepared / "validation", 1)),
        reader((prepared / "train", 1), (prepared / "validation", 1)),
        reader((prepared / "train", 1), seed=4),
        reader((prepared / "train", 1), batch=4),
    ]
    assert all(other.fingerprint() != alone for other in others)


def test_the_fingerprint_tells_seeds_apart_where_they_change_the_rows(prepared):
    mixed = [(prepared / "train", 3), (prepared / "validation", 1)]

    def of(paths, seed, shuffle=False):
        rows = reader(*paths, seed=seed, shuffle=shuffle)
        return rows.fingerprint(), rows.samples_of(5, range(BATCH))

    for first, second in zip(of(mixed, 1), of(mixed, 2), strict=True):
        assert first != second
    assert of(mixed[:1], 1) == of(mixed[:1], 2)
    # As runs that began earlier have it: nothing but shares and period where orders tell enough.
    assert all(len(of(paths, 1, shuffle=True)[0]["mixture"]) == len(paths) + 1
               for paths in (mixed, mixed[:1]))  # fmt: skip


def test_a_wrong_row_length_names_both_numbers_and_the_setting(prepared):
    with pytest.raises(DataError, match=r"rows of 16 .*train\.sequence_length=32"):
        reader((prepared / "train", 1), length=32)


def test_a_wrong_vocabulary_names_both_numbers_and_the_setting(prepared):
    with pytest.raises(DataError, match=r"vocabulary of 300 .*model\.vocab_size=512"):
        reader((prepared / "train", 1), vocab=512)


def test_a_missing_or_empty_folder_is_refused(prepared, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        reader((tmp_path / "nothing", 1))
    with pytest.raises(DataError, match="it is empty"):
        reader((tmp_path, 1))
    with pytest.raises(DataError, match=r"name one split, such as .*/train"):
        reader((prepared, 1))
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=r"\(it holds notes\.txt\)$"):  # and no split to name
        reader((tmp_path, 1))


def test_a_replaced_tokenizer_is_refused(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "set")
    with (tmp_path / "set" / "tokenizer.json").open("a") as file:
        file.write(" ")
    with pytest.raises(DataError, match="is not the one that made"):
        reader((tmp_path / "set" / "train", 1))
