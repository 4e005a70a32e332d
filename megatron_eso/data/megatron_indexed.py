"""``data convert --from megatron-indexed``: Megatron's .bin/.idx token files to our shards.

Layout of an index (megatron/core/datasets/indexed_dataset.py): the 9 bytes MAGIC, version uint64 = 1,
one byte for the token type, uint64 number of sequences, uint64 number of document bounds, the lengths
(int32), the byte offsets (int64) and the document bounds (int64, in sequences).
"""

import json
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_eso.data.manifest import INDEX_NAME, Manifest, sha256_of
from megatron_eso.data.output import new_folder
from megatron_eso.data.pack import RowPacker
from megatron_eso.data.row_writer import RowWriter
from megatron_eso.data.tokenizer import Tokenizer
from megatron_eso.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
SHARD_BYTES = 64 << 20


@dataclass(frozen=True)
class IndexedDataset:
    """The content of a .bin (memory mapped) and a .idx file."""

    tokens: NDArray[Any]
    lengths: NDArray[np.int32]
    """Tokens of each sequence."""
    bounds: NDArray[np.int64]
    """The first sequence of each document; last, the number of sequences."""

    def documents(self) -> Iterator[NDArray[Any]]:
        """Yield the tokens of each document."""
        ends = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        for first, last in zip(self.bounds[:-1].tolist(), self.bounds[1:].tolist(), strict=True):
            yield self.tokens[ends[first] : ends[last]]


def open_indexed(prefix: Path) -> IndexedDataset:
    """Open ``prefix.bin`` and ``prefix.idx``.

    Raises:
        DataError: if a file is missing, damaged, or has another layout.
    """
    index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (index, data):
        if not path.is_file():
            raise DataError(
                f"{path} does not exist; give the path of both files without .bin and .idx"
            )
    content = index.read_bytes()
    if len(content) < HEADER.size or content[: len(MAGIC)] != MAGIC:
        raise DataError(f"{index} is not a Megatron index (it does not start with MMIDIDX)")
    _, version, code, num_sequences, num_bounds = HEADER.unpack_from(content)
    if version != 1 or code not in TYPES:
        raise DataError(
            f"{index} has version {version} and token type {code}; only version 1 and integer types are "
            "read"
        )
    expected = HEADER.size + num_sequences * 12 + num_bounds * 8
    if len(content) != expected:
        raise DataError(f"{index} has {len(content)} bytes instead of {expected}: it is damaged")
    lengths = np.frombuffer(content, np.int32, num_sequences, HEADER.size)
    bounds = np.frombuffer(content, np.int64, num_bounds, HEADER.size + num_sequences * 12)
    _check_bounds(bounds, lengths, str(index))
    dtype, num_tokens = np.dtype(TYPES[code]), int(lengths.sum(dtype=np.int64))
    num_bytes = data.stat().st_size
    if num_bytes != num_tokens * dtype.itemsize or not num_tokens:
        raise DataError(
            f"{data} has {num_bytes} bytes, its index {num_tokens} tokens of {dtype.itemsize} bytes: "
            + (
                "one of them is damaged"
                if num_bytes or num_tokens
                else "there is nothing to convert"
            )
        )
    return IndexedDataset(np.memmap(data, dtype, mode="r"), lengths, bounds)


def _check_bounds(bounds: NDArray[np.int64], lengths: NDArray[np.int32], where: str) -> None:
    """Refuse bounds that would skip sequences or use some twice."""
    steps = np.diff(bounds)
    is_whole = len(bounds) > 0 and bounds[0] == 0 and bounds[-1] == len(lengths)
    if not is_whole or (steps < 0).any() or (lengths < 0).any():
        ends = f"from {bounds[0]} to {bounds[-1]}" if len(bounds) else "none"
        raise DataError(
            f"{where} is damaged: its documents' bounds ({len(bounds)}, {ends}) must grow from 0 to its "
            f"{len(lengths)} sequences, whose lengths must not be negative"
        )


def convert_indexed(
    prefix: Path, out: Path, tokenizer_path: Path, sequence_length: int
) -> Manifest:
    """Write the documents of a Megatron data set as one split; return its manifest.

    If a document already ends with an end-of-document token, none is added. Bytes of text are counted
    by decoding.

    Raises:
        DataError: for a token that the tokenizer does not know, or if ``out`` is not empty.
    """
    dataset, tokenizer = open_indexed(prefix), Tokenizer(tokenizer_path)
    with new_folder(out) as temporary:
        manifest = _write(dataset, temporary, tokenizer, sequence_length, f"{prefix}.bin")
        shutil.copyfile(tokenizer_path, temporary / "tokenizer.json")
        manifest.save(temporary)
    return manifest


def _write(
    dataset: IndexedDataset, folder: Path, tokenizer: Tokenizer, length: int, where: str
) -> Manifest:
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    end = tokenizer.end_of_document_id
    packer = RowPacker(
        sequence_length=length, mask_id=tokenizer.mask_id, end_of_document_id=end, separate=False
    )
    num_documents = text_bytes = 0
    with RowWriter(
        folder, dtype=dtype, row_tokens=length + 1, shard_bytes=SHARD_BYTES, zstd=False
    ) as writer:
        for number, document in enumerate(dataset.documents()):
            tokens = _checked(document, tokenizer, f"{where}, document {number}")
            tokens = tokens[:-1] if len(tokens) and tokens[-1] == end else tokens
            text_bytes += len(tokenizer.decode(tokens.tolist()).encode())
            num_documents += 1
            for block in chain(packer.add(tokens), packer.end_document()):
                writer.write(block)
        for block in packer.finish():
            writer.write(block)
    if not writer.num_rows:
        raise DataError(f"{where} holds no documents")
    shards = json.loads((folder / INDEX_NAME).read_text())["shards"]
    return Manifest(
        split=folder.name, tokenizer_file="tokenizer.json",
        tokenizer_sha256=tokenizer.sha256, vocab_size=tokenizer.vocab_size, sequence_length=length,
        dtype=dtype, packing="packed", end_of_document_id=end, num_samples=writer.num_rows,
        num_tokens=packer.num_tokens, num_documents=num_documents, text_bytes=text_bytes,
        num_skipped=0, num_shards=len(shards), index_sha256=sha256_of(folder / INDEX_NAME),
    )  # fmt: skip


def _checked(document: NDArray[Any], tokenizer: Tokenizer, where: str) -> NDArray[np.uint32]:
    if len(document) and not 0 <= int(document.min()) <= int(document.max()) < tokenizer.mask_id:
        raise DataError(
            f"{where} holds tokens {int(document.min())} to {int(document.max())}, but the tokenizer "
            f"{tokenizer.path} has 0 to {tokenizer.mask_id - 1}; give the one that made them (--tokenizer)"
        )
    return document.astype(np.uint32)
