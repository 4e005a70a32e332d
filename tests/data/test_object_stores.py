"""``data prepare`` into S3 and into Google's S3-compatible interface, by a real server and a proxy."""

import multiprocessing
import os
import signal
import time
from unittest import mock

import numpy as np
import pytest

from megatron_eso.config.schema import DataConfig
from megatron_eso.data import publish, sources
from megatron_eso.data.object_store import ObjectFolder
from megatron_eso.data.open_split import tokenizer_of
from megatron_eso.data.prepare import prepare
from megatron_eso.errors import DataError
from tests.data.conftest import all_rows, options, write_corpus


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(publish, "FIRST_PAUSE_SECONDS", 0.01)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Return a folder of several partitions."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(3):
        write_corpus(folder / f"{number}.jsonl", num_documents=400, seed=number)
    return folder


@pytest.fixture(scope="module")
def local(texts, prepared, tmp_path_factory):
    """Return what a local folder receives."""
    out = tmp_path_factory.mktemp("local") / "set"
    send(texts, out, prepared)
    return out


def send(texts, out, prepared, *, staging=None, num_processes=1, overwrite=False, **changes):
    with mock.patch.object(sources, "SMALLEST_PARTITION_BYTES", 80_000):  # a partition per file
        return prepare(
            [str(texts)], out, options(**changes), tokenizer=str(prepared / "tokenizer.json"),
            num_processes=num_processes, staging=staging, overwrite=overwrite,
        )  # fmt: skip


def rows(address, tmp_path) -> np.ndarray:
    return all_rows(address, tmp_path / "cache", timeout_seconds=5.0)


def assert_same_rows(address, local, tmp_path) -> None:
    for split in ("train", "validation"):
        found = rows(f"{address}/{split}", tmp_path)
        assert np.array_equal(found, rows(local / split, tmp_path))


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_an_object_store_receives_the_rows_a_folder_would(
    store, texts, local, prepared, tmp_path, scheme
):
    address = f"{scheme}://shards/{scheme}-rows"
    done = send(texts, address, prepared, staging=tmp_path / "work")
    assert not done.was_complete
    assert_same_rows(address, local, tmp_path)
    assert not (tmp_path / "work").exists()
    again = send(texts, address, prepared, staging=tmp_path / "work")
    assert again.was_complete
    assert again.manifests == done.manifests
    manifest = done.manifests["train"]
    read = tokenizer_of(f"{address}/train", manifest, DataConfig(cache_dir=str(tmp_path / "c")))
    assert read.sha256 == manifest.tokenizer_sha256


@pytest.mark.parametrize("fault", ["503", "403", "flip"])
def test_an_upload_that_fails_is_tried_again_or_named(
    store, texts, local, prepared, tmp_path, fault
):
    address = f"s3://shards/fault-{fault}"
    store.faults = {f"fault-{fault}/train/part-00001-shard.00000.mds": [fault]}
    if fault == "403":
        with pytest.raises(DataError, match=r"part-00001-shard\.00000\.mds could not be written"):
            send(texts, address, prepared, staging=tmp_path / "work")
        assert "train/manifest.json" not in store.names(f"fault-{fault}")
        store.requests.clear()
    send(texts, address, prepared, staging=tmp_path / "work")
    assert store.faults.popitem()[1] == []
    sent_again = any("PUT" in one and "part-00000-shard" in one for one in store.requests)
    assert sent_again == (fault != "403")  # what had been sent before the error stays
    assert_same_rows(address, local, tmp_path)


def test_a_store_that_stays_away_is_an_error_and_leaves_no_data_set(
    store, texts, prepared, tmp_path
):
    store.faults = {"away/validation/manifest.json": ["503!"]}
    with pytest.raises(DataError, match=r"manifest\.json could not be .* after 6 of 6 attempts"):
        send(texts, "s3://shards/away", prepared, staging=tmp_path / "work")
    store.faults = {}
    assert "train/manifest.json" not in store.names("away")


@pytest.mark.slow
def test_a_killed_upload_continues(store, texts, local, prepared, tmp_path):
    address = "s3://shards/killed"
    arguments = (texts, address, prepared)
    process = multiprocessing.get_context("spawn").Process(
        target=send, args=arguments, kwargs={"staging": tmp_path / "work"}
    )
    store.faults = {"killed/train/part-00002-shard.00000.mds": ["stall!"]}
    process.start()
    deadline = time.monotonic() + 120
    while not any("killed/train/part-00002" in one for one in store.requests):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    store.faults = {}
    store.requests.clear()
    send(*arguments, staging=tmp_path / "work")
    assert not any("PUT" in one and "part-00000" in one for one in store.requests)
    assert_same_rows(address, local, tmp_path)


def test_another_request_for_the_address_is_refused_or_replaces_what_is_there(
    store, texts, prepared, tmp_path
):
    address = "s3://shards/other"
    send(texts, address, prepared, staging=tmp_path / "work")
    before = store.names("other/train")
    with pytest.raises(DataError, match=r"--packing: packed -> separate.*--overwrite"):
        send(texts, address, prepared, staging=tmp_path / "work", packing="separate")
    assert store.names("other/train") == before
    done = send(texts, address, prepared, staging=tmp_path / "work", packing="separate",
                overwrite=True)  # fmt: skip
    assert len(rows(f"{address}/train", tmp_path)) == done.manifests["train"].num_samples


def test_what_was_sent_before_a_bad_document_stays_where_such_are_skipped(
    store, prepared, tmp_path
):
    (tmp_path / "texts").mkdir()
    for number in range(2):
        write_corpus(tmp_path / f"texts/{number}.jsonl", num_documents=400, seed=number)
    with open(tmp_path / "texts/1.jsonl", "a") as file:
        file.write("oops\n")
    address, staging = "s3://shards/bad", tmp_path / "work"
    with pytest.raises(DataError, match="--bad-documents skip"):
        send(tmp_path / "texts", address, prepared, staging=staging)
    store.requests.clear()
    send(tmp_path / "texts", address, prepared, staging=staging, bad_documents="skip")
    assert not any("PUT" in one and "part-00000" in one for one in store.requests)
    with pytest.raises(DataError, match="--bad-documents: skip -> error"):
        send(tmp_path / "texts", address, prepared, staging=staging)
    send(tmp_path / "texts", tmp_path / "local", prepared, bad_documents="skip")
    assert_same_rows(address, tmp_path / "local", tmp_path)


@pytest.mark.parametrize("same", [True, False])
def test_of_two_hosts_that_begin_at_once_one_has_the_address(store, monkeypatch, same):
    address = f"s3://shards/race-{same}"
    mine, theirs = {"packing": "packed"}, {"packing": "packed" if same else "separate"}
    look = ObjectFolder.is_empty

    def look_and_be_late(folder):
        found = look(folder)
        monkeypatch.setattr(ObjectFolder, "is_empty", look)
        assert publish.Destination(address).claim("prepare.json", theirs) is None
        return found

    monkeypatch.setattr(ObjectFolder, "is_empty", look_and_be_late)
    here = publish.Destination(address)
    assert here.claim("prepare.json", mine) == theirs
    assert here.claim("prepare.json", mine) == theirs


def test_a_store_without_conditional_writes_is_still_written_to(store):
    here = publish.Destination("s3://shards/old-store")
    store.faults["old-store/prepare.json"] = ["", "501"]  # read, then written on a condition
    assert here.claim("prepare.json", {"a": 1}) is None
    assert here.claim("prepare.json", {"a": 2}) == {"a": 1}


def test_an_address_with_other_objects_is_left_alone(store, texts, prepared, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "precious.txt").write_text("keep")
    address = store.upload(tmp_path / "theirs", "theirs")
    with pytest.raises(DataError, match="was not made by data prepare"):
        send(texts, address, prepared, staging=tmp_path / "work", overwrite=True)
    assert store.names("theirs") == ["precious.txt"]


def test_wrong_credentials_are_named(store, texts, prepared, tmp_path, monkeypatch):
    store.require_credentials(is_required=True)
    try:
        with pytest.raises(DataError, match=r"HTTP 403 InvalidAccessKeyId.* the credentials"):
            send(texts, "s3://shards/refused", prepared, staging=tmp_path / "work")
    finally:
        store.require_credentials(is_required=False)


def test_a_store_that_cannot_be_written_to_is_refused_with_what_can(
    texts, prepared, tmp_path, monkeypatch
):
    monkeypatch.delenv("GCS_KEY", raising=False)
    for address in ("gs://bucket/set", "azure://bucket/set"):
        with pytest.raises(DataError, match="GCS_KEY and GCS_SECRET"):
            send(texts, address, prepared, staging=tmp_path / "work")


def test_two_processes_send_what_one_does(store, texts, local, prepared, tmp_path):
    send(texts, "s3://shards/two", prepared, staging=tmp_path / "work", num_processes=2)
    assert_same_rows("s3://shards/two", local, tmp_path)


def test_overwriting_removes_what_was_prepared_and_nothing_whose_name_begins_alike(
    store, texts, prepared, tmp_path
):
    address = "s3://shards/mine"
    send(texts, address, prepared, staging=tmp_path / "work")
    folder = ObjectFolder.open(address, 5.0)
    others = ["train-run7/model.bin", "training-notes.md", "validation_by_hand.jsonl"]
    for name in others:
        folder.put(name, b"x")
    send(texts, address, prepared, staging=tmp_path / "work", overwrite=True, packing="separate")
    assert all(folder.get(name) == b"x" for name in others)


def test_a_bucket_that_holds_something_is_not_empty(store):
    folder = ObjectFolder.open("s3://shards", 5.0)
    folder.put("something", b"x")
    assert not folder.is_empty()
