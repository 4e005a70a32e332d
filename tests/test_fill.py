"""What a rank reads from a checkpoint's files for the tensors that it wants, and into which memory."""

import mmap
import pickle
from dataclasses import replace

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_eso.checkpoint import fill as fill_module
from megatron_eso.checkpoint import torch_dist
from megatron_eso.checkpoint.fill import ShardedTensor, fill
from megatron_eso.checkpoint.torch_dist import TorchDistReader
from megatron_eso.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:.*assuming the intent is to:UserWarning")


@pytest.fixture
def reads(monkeypatch):
    """Return the list of every read of a part's bytes: file, first byte, target."""
    found, into = [], fill_module._read_into
    monkeypatch.setattr(fill_module, "_read_into", lambda *one: (found.append(one), into(*one)))
    return found


def written(folder, **tensors):
    save(tensors, storage_writer=FileSystemWriter(folder), no_dist=True)
    return TorchDistReader(folder)


def test_tensors_wanted_whole_are_read_straight_into_their_memory(tmp_path, reads):
    stored = {name: torch.arange(12.0).view(3, 4) + n for n, name in enumerate("abc")}
    stored["turned"] = stored["c"].T
    reader = written(tmp_path, **stored)
    found = {
        "a": torch.zeros(3, 4),
        "b": torch.zeros(3, 4, dtype=torch.float64),
        "c": torch.zeros(4, 3).T,
        "turned": torch.zeros(4, 3),
    }
    wanted = [ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in found.items()]
    fill(reader, wanted)
    assert all(torch.equal(found[name], stored[name].to(found[name].dtype)) for name in stored)
    mine = {tensor.data_ptr() for tensor in found.values()}
    places = [(first, target.data_ptr()) for _, first, target in reads]
    assert [place for _, place in places if place in mine] == [found["a"].data_ptr()]
    data = next(tmp_path.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[: places[0][0] + 20])
    with pytest.raises(CheckpointError, match="ends before its tensors do"):
        fill_module._read_into(*reads[0])
    with pytest.raises(CheckpointError, match="incomplete"):
        fill(TorchDistReader(tmp_path), wanted)


def test_tensors_that_are_not_the_checkpoints_are_refused_by_name(tmp_path):
    reader = written(tmp_path, a=torch.ones(4, 2))
    for name, shape, words in (
        ("b", (4, 2), "does not hold the tensor b"),
        ("a", (5, 2), "holds a with shape"),
    ):
        with pytest.raises(CheckpointError, match=words):
            fill(reader, [ShardedTensor.from_rank_offsets(name, torch.zeros(shape))])
    padded = torch.full((5, 2), 7.0)
    fill(reader, [ShardedTensor.from_rank_offsets("a", padded, allow_shape_mismatch=True)])
    assert padded.tolist() == [[1.0, 1.0]] * 4 + [[0.0, 0.0]]
    (part,) = reader.tensors["a"].chunks
    reader.tensors["a"] = replace(reader.tensors["a"], chunks=(replace(part, sizes=(3, 2)),))
    with pytest.raises(CheckpointError, match="do not make up the whole tensor"):
        fill(reader, [ShardedTensor.from_rank_offsets("a", torch.zeros(4, 2))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["as-stored", "converted"])
def test_of_a_part_with_rows_for_many_ranks_a_rank_reads_its_own_alone(tmp_path, reads, dtype):
    """A layer written at tensor=1 and read at tensor=4; the first axis counts layers."""
    stored = torch.arange(96.0).view(1, 8, 3, 4)
    reader, mine = written(tmp_path, layer=stored), torch.zeros(2, 3, 4, dtype=dtype)
    place = (1, 3, 4)  # axis, rank, ranks
    wanted = ShardedTensor.from_rank_offsets("layer", mine, (0, 0, 1), place, prepend_axis_num=1)
    fill(reader, [wanted])
    assert torch.equal(mine, stored[0, 6:].to(dtype))
    assert sum(target.nbytes for *_, target in reads) == stored.nbytes // 4
    straight = [target.data_ptr() for *_, target in reads] == [mine.data_ptr()]
    assert straight == (dtype == torch.float32)


@pytest.mark.parametrize("block_bytes", [1, 200, 1 << 20])
def test_what_cannot_be_read_straight_needs_memory_for_a_block_alone(
    tmp_path, reads, monkeypatch, block_bytes
):
    monkeypatch.setattr(fill_module, "BLOCK_BYTES", block_bytes)
    stored = torch.arange(320.0).view(20, 16)
    reader, mine = written(tmp_path, columns=stored), torch.zeros(20, 4)
    fill(reader, [ShardedTensor.from_rank_offsets("columns", mine, (1, 2, 4))])
    assert torch.equal(mine, stored[:, 8:12])
    sizes = [target.nbytes for *_, target in reads]
    assert sum(sizes) == stored.nbytes
    assert max(sizes) <= max(block_bytes, 64)  # a row's bytes


def test_a_tensor_of_one_number_is_read(tmp_path):
    mine = torch.zeros(())
    fill(written(tmp_path, one=torch.tensor(3.0)), [ShardedTensor.from_rank_offsets("one", mine)])
    assert mine == 3.0


def test_no_page_of_a_mapping_is_touched(tmp_path, monkeypatch):
    """A mapped page that cannot be read ends the process; a failed read is an error that ranks share."""

    class Untouched(mmap.mmap):
        def __getitem__(self, place):
            raise AssertionError("a page of the mapping")

    monkeypatch.setattr(torch_dist.mmap, "mmap", Untouched)
    mine = torch.zeros(4, 2)
    fill(written(tmp_path, a=torch.ones(4, 2)), [ShardedTensor.from_rank_offsets("a", mine)])
    assert mine.sum() == 8


def test_an_index_with_parts_of_other_dimensions_is_damaged(tmp_path):
    """All ranks notice it when they read the index; ranks that want no such part would not notice later."""
    written(tmp_path, a=torch.ones(4, 2))
    path = tmp_path / ".metadata"
    content = pickle.loads(path.read_bytes())
    (chunk,) = content.state_dict_metadata["a"].chunks
    chunk.sizes = torch.Size((4, 2, 1))
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match=r"\.metadata: a has 2 dimensions, but .* has 3"):
        TorchDistReader(tmp_path)
