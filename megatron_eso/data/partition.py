"""One worker's part of preparing data: read, split, tokenize, pack and write one partition.

A partition is written to ``part-xxxxx.tmp``, with its counts in ``part.json``, and renamed when it is
whole; an interrupted one is simply done again. If the output is an object store, the shards are sent
there before the renaming.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_eso.data.documents import Document, documents_of, refuse
from megatron_eso.data.output import describe_write_error
from megatron_eso.data.pack import RowPacker
from megatron_eso.data.publish import Destination
from megatron_eso.data.row_writer import RowWriter
from megatron_eso.data.sources import TEXT_KEY, Partition
from megatron_eso.data.tokenizer import Tokenizer, pieces_of
from megatron_eso.errors import DataError

SPLITS = ("train", "validation")
PART_NAME = "part.json"
# Characters encoded in one call: enough to keep the encoder busy, few enough to hold in memory.
BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class PrepareOptions:
    """The options that decide the prepared rows; stored beside them and compared by later runs."""

    sequence_length: int
    """L: tokens between the starts of two rows."""
    vocab_size: int
    """Number of token ids, the mask token included."""
    text_key: str = TEXT_KEY
    """Key or column that holds the text in jsonl, parquet and arrow files."""
    packing: str = "packed"
    """packed or separate."""
    validation_fraction: float = 0.05
    """Share of the documents to hold out, chosen by hash."""
    bad_documents: str = "error"
    """error or skip."""
    shard_mib: int = 64
    """Largest shard before compression, in MiB."""
    compress: bool = False
    """Write zstd shards (for object stores)."""
    partition_mib: int | None = None
    """Input per partition, in MiB; None: follows from the size of the inputs."""

    @property
    def dtype(self) -> str:
        """Return the type of the stored tokens: the smallest that holds the vocabulary."""
        return "uint16" if self.vocab_size <= 1 << 16 else "uint32"


@dataclass(frozen=True)
class Preparation:
    """What every worker of one preparation needs to know."""

    work: Path
    """Folder of the finished partitions."""
    tokenizer_path: Path
    """tokenizer.json."""
    options: PrepareOptions
    """The options that decide the rows."""
    address: str | None = None
    """Object store that receives the shards of finished partitions; None: they stay local."""

    def folder_of(self, partition: Partition) -> Path:
        """Return the folder of a finished partition."""
        return self.work / f"part-{partition.number:05d}"

    def is_finished(self, partition: Partition) -> bool:
        """Return whether an earlier run finished a partition."""
        return (self.folder_of(partition) / PART_NAME).is_file()


@dataclass
class SplitCounts:
    """What one partition added to one split."""

    num_samples: int = 0
    """Rows."""
    num_tokens: int = 0
    """Tokens without padding."""
    num_documents: int = 0
    """Documents."""
    text_bytes: int = 0
    """Bytes of their text."""
    num_skipped: int = 0
    """Documents left out."""


@dataclass
class _Output:
    """A split being written: its packer, writer and counts."""

    packer: RowPacker
    writer: RowWriter
    counts: SplitCounts = field(default_factory=SplitCounts)

    def write(self, rows: Iterator[NDArray[np.uint32]]) -> None:
        for block in rows:
            self.writer.write(block)


@dataclass
class _Meter:
    """How much of a partition's inputs has been read, and how much of that was reported."""

    report: Callable[[int, int], None]
    before: int = 0  # bytes of the finished pieces
    read: int = 0
    reported: int = 0

    def note(self, num_bytes: int) -> None:
        self.read = num_bytes

    def end_piece(self) -> None:
        self.before, self.read = self.before + self.read, 0

    def report_tokens(self, num_tokens: int) -> None:
        done = self.before + self.read
        self.report(done - self.reported, num_tokens)
        self.reported = done


def split_of(document: Document, validation_fraction: float) -> str:
    """Return a document's split, from a hash of its key, so that equal documents stay together."""
    digest = blake2b(document.split_key.encode(errors="surrogatepass"), digest_size=8).digest()
    is_held_out = int.from_bytes(digest, "big") < validation_fraction * 2**64
    return SPLITS[int(is_held_out)]


def write_partition(
    partition: Partition, preparation: Preparation, report: Callable[[int, int], None]
) -> None:
    """Turn a partition into shards under ``part-xxxxx``.

    Args:
        partition: what to read.
        preparation: where to write, with which tokenizer and options.
        report: called with the (bytes of the inputs as stored, tokens) done since the last call.

    Raises:
        DataError: for an unusable document, a full disk, or missing permissions.
    """
    done = preparation.folder_of(partition)
    temporary = done.with_suffix(".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        tokenizer = _loaded(
            preparation.tokenizer_path, preparation.tokenizer_path.stat().st_mtime_ns
        )
        counts = _write_splits(partition, temporary, tokenizer, preparation.options, report)
        account = {split: asdict(count) for split, count in counts.items()}
        (temporary / PART_NAME).write_text(json.dumps(account))
        if preparation.address is not None:
            Destination(preparation.address).send_shards(temporary, done.name, SPLITS)
        os.replace(temporary, done)
    except OSError as error:
        raise DataError(describe_write_error(error, preparation.work)) from error


@lru_cache(maxsize=1)
def _loaded(path: Path, changed: int) -> Tokenizer:
    """Return a file's tokenizer; one for all partitions keeps its cache of words."""
    del changed  # only part of the cache key: another file may take the path
    return Tokenizer(path)


def _write_splits(
    partition: Partition,
    folder: Path,
    tokenizer: Tokenizer,
    options: PrepareOptions,
    report: Callable[[int, int], None],
) -> dict[str, SplitCounts]:
    with ExitStack() as stack:
        outputs = {
            split: _open_output(stack, folder / split, tokenizer, options) for split in SPLITS
        }
        batch: list[tuple[_Output, str, bool]] = []
        characters, meter = 0, _Meter(report)
        for output, document in _routed(partition, outputs, options, meter):
            for piece in pieces_of(document.text):
                batch.append((output, piece, False))
                characters += len(piece)
                if characters >= BATCH_CHARACTERS:
                    meter.report_tokens(_encode(batch, tokenizer, options))
                    batch, characters = [], 0
            batch.append((output, "", True))
        meter.report_tokens(_encode(batch, tokenizer, options))
        for output in outputs.values():
            output.write(output.packer.finish())
            output.counts.num_samples = output.writer.num_rows
            output.counts.num_tokens = output.packer.num_tokens
    return {split: output.counts for split, output in outputs.items()}


def _routed(
    partition: Partition, outputs: dict[str, _Output], options: PrepareOptions, meter: _Meter
) -> Iterator[tuple[_Output, Document]]:
    for piece in partition.pieces:
        for document in documents_of(piece, text_key=options.text_key, note=meter.note):
            output = outputs[split_of(document, options.validation_fraction)]
            if document.problem is None:
                output.counts.num_documents += 1
                output.counts.text_bytes += len(document.text.encode())
                yield output, document
            elif options.bad_documents == "skip":
                output.counts.num_skipped += 1
            else:
                refuse(document)
        meter.end_piece()


def _open_output(
    stack: ExitStack, folder: Path, tokenizer: Tokenizer, options: PrepareOptions
) -> _Output:
    writer = RowWriter(
        folder,
        dtype=options.dtype,
        row_tokens=options.sequence_length + 1,
        shard_bytes=options.shard_mib << 20,
        zstd=options.compress,
    )
    packer = RowPacker(
        sequence_length=options.sequence_length,
        mask_id=options.vocab_size - 1,
        end_of_document_id=tokenizer.end_of_document_id,
        separate=options.packing == "separate",
    )
    return _Output(packer, stack.enter_context(writer))


def _encode(
    batch: list[tuple[_Output, str, bool]],
    tokenizer: Tokenizer,
    options: PrepareOptions,
) -> int:
    """Encode and write a batch; return its number of tokens, without end tokens."""
    encoded = iter(tokenizer.encode_pieces([piece for _, piece, ends in batch if not ends]))
    num_tokens = 0
    for output, _, ends in batch:
        if ends:
            output.write(output.packer.end_document())
            continue
        tokens = next(encoded)
        if len(tokens) and int(tokens.max()) >= options.vocab_size - 1:
            raise DataError(
                f"the tokenizer made token {int(tokens.max())}, beyond the vocabulary of "
                f"{options.vocab_size - 1} tokens that {tokenizer.path} states"
            )
        output.write(output.packer.add(tokens))
        num_tokens += len(tokens)
    return num_tokens
