"""Rows in memory from raw, unprepared text, for zero-shot evaluation."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_eso.data.documents import Document, documents_of, refuse
from megatron_eso.data.pack import RowPacker
from megatron_eso.data.reader import TokenRows
from megatron_eso.data.sources import TEXT_KEY, find_files, require_records
from megatron_eso.data.tokenizer import Tokenizer, pieces_of
from megatron_eso.errors import DataError


class TextRows:
    """Rows of one or more text, jsonl, parquet or arrow files, in reading order."""

    def __init__(
        self,
        source: str | Path,
        tokenizer_path: Path,
        *,
        sequence_length: int,
        vocab_size: int,
        text_key: str | None = None,
        max_rows: int = 0,
        skips_bad: bool = False,
    ) -> None:
        """Read and encode the text; nothing is written.

        Args:
            source: a file, a folder of files, ``stdlib`` or ``hf:NAME``.
            tokenizer_path: tokenizer.json of the model.
            sequence_length: L; documents are packed one after the other, each with its end token.
            vocab_size: vocabulary of the model, mask token included.
            text_key: key or column of the text; None: "text".
            max_rows: stop after this many rows; 0: read all.
            skips_bad: leave out and count documents that cannot be used, instead of raising.

        Raises:
            DataError: if text cannot be read, a document cannot be used, the tokenizer has another
                size, or there is no row.
        """
        tokenizer = Tokenizer(tokenizer_path)
        tokenizer.check_vocabulary(vocab_size, "model.vocab_size")
        packer = RowPacker(
            sequence_length=sequence_length,
            mask_id=tokenizer.mask_id,
            end_of_document_id=tokenizer.end_of_document_id,
            separate=False,
        )
        self._text_bytes = 0
        self.num_skipped = 0
        blocks: list[NDArray[np.uint32]] = []
        num_rows = 0
        documents = self._usable(_documents(str(source), text_key), skips_bad)
        for block in self._pack(documents, tokenizer, packer):
            blocks.append(block)
            num_rows += len(block)
            if 0 < max_rows <= num_rows:
                break
        if not blocks:
            left_out = f": {self.num_skipped} bad documents were left out" * (self.num_skipped > 0)
            raise DataError(f"{source} holds no text to score{left_out}")
        stored = np.concatenate(blocks)[: max_rows or None].astype(np.int64)
        self._is_valid = stored != tokenizer.mask_id
        self._tokens = np.where(self._is_valid, stored, tokenizer.end_of_document_id)
        self.bytes_per_token = self._text_bytes / packer.num_tokens

    @property
    def num_rows(self) -> int:
        """Return the number of rows."""
        return len(self._tokens)

    def read(self, rows: Sequence[int]) -> TokenRows:
        """Return rows by number."""
        wanted = np.array(rows, np.int64)
        return TokenRows(self._tokens[wanted], self._is_valid[wanted])

    def _usable(self, documents: Iterator[Document], skips_bad: bool) -> Iterator[Document]:
        for document in documents:
            if document.problem is None:
                yield document
            elif skips_bad:
                self.num_skipped += 1
            else:
                refuse(document)

    def _pack(
        self, documents: Iterator[Document], tokenizer: Tokenizer, packer: RowPacker
    ) -> Iterator[NDArray[np.uint32]]:
        for document in documents:
            for piece in pieces_of(document.text):
                self._text_bytes += len(piece.encode())
                yield from packer.add(np.array(tokenizer.encode(piece), np.uint32))
            yield from packer.end_document()
        yield from packer.finish()


def _documents(source: str, text_key: str | None) -> Iterator[Document]:
    pieces = find_files([source])
    require_records(pieces, text_key)
    for piece in pieces:
        yield from documents_of(piece, text_key=text_key or TEXT_KEY)
