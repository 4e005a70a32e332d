"""What we rely on in mosaicml-streaming 0.13: its order, its files, and that it can be avoided."""

import importlib.metadata
import json
import subprocess
import sys

import numpy as np
import pytest

from megatron_eso.data import streaming_shim
from megatron_eso.data.order import SampleOrder
from megatron_eso.data.reader import ValidationReader
from megatron_eso.data.row_writer import RowWriter
from megatron_eso.errors import DataError
from tests.data.conftest import SEQUENCE_LENGTH, VOCAB_SIZE


def test_the_version_is_the_one_whose_internals_are_used():
    assert importlib.metadata.version("mosaicml-streaming").startswith("0.13.")


@pytest.mark.parametrize("seed", [1, 9176])
@pytest.mark.parametrize("nodes", [1, 4])
def test_a_data_set_of_one_group_has_streamings_own_order(seed, nodes):
    sizes = np.array([50, 64, 33, 64])
    order = SampleOrder(sizes.tolist(), seed=seed, block_size=128, nodes=nodes)
    shuffle = streaming_shim.load("shuffle").get_shuffle
    for epoch in (0, 1, 7):
        places = np.arange(211) + 211 * epoch
        expected = shuffle("py1e", sizes, nodes, seed, epoch, 128)
        assert np.array_equal(order.samples_at(places), expected)


def test_streamings_reader_reads_the_rows_we_read(prepared):
    reader_class = streaming_shim.load("format.mds.reader").MDSReader
    folder = prepared / "train"
    ours = ValidationReader(folder, sequence_length=SEQUENCE_LENGTH, vocab_size=VOCAB_SIZE)
    number = 0
    for entry in json.loads((folder / "index.json").read_text())["shards"]:
        shard = reader_class.from_json(str(folder), "", entry)
        for row in range(entry["samples"]):
            theirs = shard.decode_sample(shard.get_sample_data(row))["tokens"]
            read = ours.read([number])
            assert np.array_equal(theirs[read.is_valid[0]], read.tokens[0][read.is_valid[0]])
            number += 1
    assert number == ours.num_rows


DATASET_ORDER = """
import json, sys
from megatron_eso.data import streaming_shim
dataset = streaming_shim.load("dataset").StreamingDataset(
    local=sys.argv[1], shuffle=True, shuffle_algo="py1e", shuffle_seed=5, num_canonical_nodes=1,
    batch_size=1, shuffle_block_size=1 << 18)
print(json.dumps([sample["tokens"].tolist() for sample in dataset]))
"""


@pytest.mark.slow
def test_one_canonical_node_reads_in_the_order_of_streamings_own_iteration(prepared):
    command = [sys.executable, "-W", "ignore", "-c", DATASET_ORDER, str(prepared / "train")]
    theirs = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    ours = ValidationReader(
        prepared / "train", sequence_length=SEQUENCE_LENGTH, vocab_size=VOCAB_SIZE
    )
    sizes = streaming_sizes(prepared)
    places = SampleOrder(sizes, seed=5).samples_at(np.arange(sum(sizes)))
    mask = VOCAB_SIZE - 1
    read = ours.read(places.tolist())
    stored = np.where(read.is_valid, read.tokens, mask)
    assert stored.tolist() == theirs


def streaming_sizes(folder) -> list[int]:
    index = json.loads((folder / "train" / "index.json").read_text())
    return [entry["samples"] for entry in index["shards"]]


def test_importing_it_needs_no_torchvision_nor_transformers():
    code = (
        "import sys; from megatron_eso.data import streaming_shim as shim;"
        "shim.load('format.mds.writer'); shim.load('shuffle'); shim.load('storage.download');"
        "assert not {'torchvision', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_installation_is_an_error_with_the_command(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "streaming"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(streaming_shim.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install --no-deps mosaicml-streaming==0\.13\.0"):
        streaming_shim.load("shuffle")


@pytest.mark.parametrize("zstd", [False, True])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_our_writer_makes_the_files_of_streamings(tmp_path, dtype, zstd):
    rows = np.random.default_rng(1).integers(0, 60_000, (100, 17)).astype(dtype)
    row_bytes = rows[0].nbytes + 4
    numbers = set()
    for size in (400, *range(2000, 2000 + row_bytes + 2)):  # one row more fits in somewhere
        files = {}
        for name, write in (("theirs", _write_by_streaming), ("ours", _write_by_us)):
            folder = tmp_path / f"{name}{size}"
            write(folder, rows, size, zstd)
            files[name] = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert files["ours"] == files["theirs"]
        numbers.add(len(json.loads(files["ours"]["index.json"])["shards"]))
    assert len(numbers) > 1


def test_a_row_larger_than_a_shard_gets_one_of_its_own(tmp_path):
    """Streaming's writer puts an empty shard before them."""
    _write_by_us(tmp_path, np.zeros((100, 17), np.uint16), 100, zstd=False)
    shards = json.loads((tmp_path / "index.json").read_text())["shards"]
    assert [shard["samples"] for shard in shards] == [1] * 100


def _write_by_streaming(folder, rows, size, zstd):
    writer = streaming_shim.load("format.mds.writer").MDSWriter(
        out=str(folder), columns={"tokens": f"ndarray:{rows.dtype}:17"},
        compression="zstd" if zstd else None, hashes=["xxh64"], size_limit=size,
    )  # fmt: skip
    with writer:
        for row in rows:
            writer.write({"tokens": row})


def _write_by_us(folder, rows, size, zstd):
    with RowWriter(
        folder, dtype=str(rows.dtype), row_tokens=17, shard_bytes=size, zstd=zstd
    ) as writer:
        for block in np.split(rows, [7, 50, 51, 99]):
            writer.write(block)


def test_a_block_left_by_an_exception_has_no_index(tmp_path):
    writer = RowWriter(tmp_path, dtype="uint16", row_tokens=4, shard_bytes=1000, zstd=False)
    with pytest.raises(RuntimeError), writer:
        writer.write(np.zeros((3, 4), np.uint16))
        raise RuntimeError
    assert not (tmp_path / "index.json").exists()


def test_workers_of_prepare_and_the_order_import_no_torch():
    code = (
        "import sys; from megatron_eso.data import order, row_writer, streaming_shim as shim, workers;"
        "shim.load('shuffle'); shim.load('hashing'); shim.load('compression');"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
