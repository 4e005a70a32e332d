"""What a prepared split says about itself: vocabulary, row length, counts and hashes.

A split is a folder (or object-store prefix) with shards, streaming's ``index.json`` and our
``manifest.json``, which is written last: a split without it is incomplete. The vocabulary includes
the mask token, which the tokenizer does not know: ``vocab_size`` is the tokenizer's vocabulary + 1, and
the mask id is ``vocab_size - 1``. Shards also use that id for padding, at the end of rows.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megatron_eso.errors import DataError
from megatron_eso.files import write_whole

MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.json"
FORMAT_VERSION = 1
PREPARE_AGAIN = "prepare the data again, with --overwrite"


@dataclass(frozen=True)
class Manifest:
    """Facts about one split; rows are blocks of ``sequence_length + 1`` tokens at a stride of L."""

    split: str
    """Name of the split: train, validation."""
    tokenizer_file: str
    """Tokenizer file, relative to the split's folder."""
    tokenizer_sha256: str
    """Hash of that file."""
    vocab_size: int
    """Number of token ids, the mask token included."""
    sequence_length: int
    """L: tokens between the starts of two rows of a packed document stream."""
    dtype: str
    """uint16 or uint32, the type of the stored tokens."""
    packing: str
    """packed: documents follow each other through rows; separate: every document starts a row."""
    end_of_document_id: int
    """Token that ends every document."""
    num_samples: int
    """Rows."""
    num_tokens: int
    """Tokens of the document stream, with end-of-document tokens, without padding."""
    num_documents: int
    """Documents."""
    text_bytes: int
    """UTF-8 bytes of the documents, used for bits per byte."""
    num_skipped: int
    """Documents left out on request (not UTF-8, empty)."""
    num_shards: int
    """Shard files."""
    index_sha256: str
    """Hash of index.json, which carries the hash of every shard."""
    format_version: int = FORMAT_VERSION
    """Version of this file's layout."""

    @property
    def mask_id(self) -> int:
        """Return the id of the mask token, which also marks padding in the shards."""
        return self.vocab_size - 1

    @property
    def row_tokens(self) -> int:
        """Return the number of tokens in a stored row, L + 1."""
        return self.sequence_length + 1

    @property
    def bytes_per_token(self) -> float:
        """Return the average bytes of text per token."""
        return self.text_bytes / self.num_tokens

    def save(self, folder: Path) -> None:
        """Write the manifest, whole or not at all."""
        write_whole(folder / MANIFEST_NAME, self.to_json())

    def to_json(self) -> str:
        """Return the content of the manifest's file."""
        return json.dumps(asdict(self), indent=2) + "\n"


def parse_manifest(text: bytes | str, where: str) -> Manifest:
    """Return the manifest parsed from a file's content.

    Raises:
        DataError: naming ``where``, for content that is not a manifest of this version.
    """
    try:
        content = json.loads(text)
        version = content.get("format_version")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{where} is not a manifest ({error}); {PREPARE_AGAIN}") from None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{where} has format_version {version}, but this program reads {FORMAT_VERSION}; "
            f"{PREPARE_AGAIN}"
        )
    known = {field.name for field in fields(Manifest)}
    if set(content) != known:
        wrong = ", ".join(sorted(set(content) ^ known))
        raise DataError(f"{where} lacks or adds the keys {wrong}; {PREPARE_AGAIN}")
    return Manifest(**content)


def load_manifest(folder: Path) -> Manifest:
    """Return the manifest of a local split.

    Raises:
        DataError: if the folder or the manifest is missing or damaged.
    """
    if folder.is_file():
        raise DataError(f"{folder} is a file; name the folder of a prepared split")
    if not folder.is_dir():
        raise DataError(
            f"data folder {folder} does not exist; make it with `megatron-eso data prepare`"
        )
    path = folder / MANIFEST_NAME
    if not path.is_file():
        inside = sorted(entry.name for entry in folder.iterdir())[:5]
        splits = sorted(folder.glob(f"*/{MANIFEST_NAME}"))
        hint = f"it holds {', '.join(inside)}" if inside else "it is empty"
        if splits:
            hint += f"; name one split, such as {splits[0].parent}"
        raise DataError(
            f"data folder {folder} has no {MANIFEST_NAME}: it is not a prepared split, or its preparation "
            f"did not finish ({hint})"
        )
    return parse_manifest(path.read_bytes(), str(path))


def local_split(folder: Path) -> Manifest:
    """Return the manifest of a local split; refuse a split whose tokenizer was replaced."""
    manifest = load_manifest(folder)
    tokenizer = folder / manifest.tokenizer_file
    if tokenizer.is_file():
        found = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
        if found != manifest.tokenizer_sha256:
            raise DataError(
                f"tokenizer {tokenizer} is not the one that made {folder}/{MANIFEST_NAME} (sha256 "
                f"{found[:12]}..., not {manifest.tokenizer_sha256[:12]}...)"
            )
    return manifest


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
