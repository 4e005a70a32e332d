"""A small corpus and a prepared data set, shared by the data tests."""

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_eso.config.schema import DataConfig
from megatron_eso.data.manifest import load_manifest, sha256_of
from megatron_eso.data.open_split import open_split
from megatron_eso.data.partition import PrepareOptions
from megatron_eso.data.prepare import prepare
from megatron_eso.data.reader import ValidationReader
from megatron_eso.data.row_writer import RowWriter
from tests.data.object_store import ObjectStore, environment

SEQUENCE_LENGTH = 16
VOCAB_SIZE = 300


def write_corpus(path: Path, num_documents: int = 400, seed: int = 0) -> list[str]:
    """Write a jsonl file of random sentences and return its documents."""
    choose = random.Random(seed)
    words = ["".join(choose.choices("abcdefghij", k=choose.randint(2, 7))) for _ in range(80)]
    texts = [
        f"{number}: " + " ".join(choose.choices(words, k=choose.randint(3, 60)))
        for number in range(num_documents)
    ]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def options(**changes) -> PrepareOptions:
    """Return options that make several small partitions possible."""
    settings = {
        "sequence_length": SEQUENCE_LENGTH,
        "vocab_size": VOCAB_SIZE,
        "validation_fraction": 0.1,
        **changes,
    }
    return PrepareOptions(**settings)


@pytest.fixture(scope="session")
def running_store() -> Iterator[ObjectStore]:
    pytest.importorskip("moto")
    pytest.importorskip("boto3")
    running = ObjectStore()
    yield running
    running.close()


@pytest.fixture(scope="module")
def store(running_store) -> Iterator[ObjectStore]:
    """Return the object store, with the environment in which boto3 finds it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(running_store).items():
            patch.setenv(name, value)
        yield running_store


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    write_corpus(path)
    return path


@pytest.fixture(scope="session")
def prepared(corpus, tmp_path_factory) -> Path:
    """Return a data set that tests must not change."""
    out = tmp_path_factory.mktemp("prepared") / "set"
    prepare([str(corpus)], out, options(), num_processes=1)
    return out


def all_rows(address: str | Path, cache: Path, **settings) -> np.ndarray:
    """Return the tokens of all rows of a split, read through a cache of its own."""
    data = DataConfig(cache_dir=str(cache), **settings)
    reader = ValidationReader(
        str(address), data, sequence_length=SEQUENCE_LENGTH, vocab_size=VOCAB_SIZE
    )
    try:
        return reader.read(range(reader.num_rows)).tokens
    finally:
        reader.close()


def in_small_shards(folder: Path, shard_bytes: int = 20_000) -> None:
    """Write a split again with several shards, as a large data set has."""
    manifest = load_manifest(folder)
    rows = open_split(str(folder), DataConfig()).read(np.arange(manifest.num_samples))
    small = folder.with_name("small")
    with RowWriter(
        small, dtype=manifest.dtype, row_tokens=manifest.row_tokens, shard_bytes=shard_bytes,
        zstd=False,
    ) as writer:  # fmt: skip
        writer.write(rows)
    count = len(json.loads((small / "index.json").read_text())["shards"])
    shutil.rmtree(folder)
    small.rename(folder)
    index = sha256_of(folder / "index.json")
    replace(manifest, num_shards=count, index_sha256=index).save(folder)
