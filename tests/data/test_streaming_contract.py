"""What we rely on in mosaicml-streaming 0.13: its order, its files, and that it can be avoided."""

import importlib.metadata
import subprocess
import sys

import numpy as np
import pytest

from megatron_eso.data import streaming_shim
from megatron_eso.data.order import SampleOrder
from megatron_eso.data.reader import ValidationReader
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
    import json

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
    import json

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
    import json

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
