"""What a folder of shards holds: the contract between preparation and training.

The tokenizer does not know the mask token: ``vocab_size`` counts its ids and the mask, whose id is
``vocab_size - 1``.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from megatron_eso.errors import DataError

FILE = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """Description of one split."""

    sequence_length: int
    """L: samples are blocks of L + 1 tokens with stride L."""
    vocab_size: int
    """Token ids including the mask token."""
    dtype: str
    """uint16 or uint32."""
    tokenizer_sha256: str
    """Hash of tokenizer.json beside the split's folder."""
    end_of_document_id: int
    """Token between documents."""
    num_documents: int
    num_tokens: int
    """Tokens of the packed documents, separators included."""
    num_samples: int
    text_bytes: int
    """UTF-8 bytes of the documents: for bits per byte."""
    index_sha256: str
    """Hash of the shards' index.json."""
    request: str
    """The settings the split was made with."""

    def save(self, folder: Path) -> None:
        """Write manifest.json; it is written last, so a folder with one is complete."""
        (folder / FILE).write_text(json.dumps(dataclasses.asdict(self), indent=1))

    @staticmethod
    def load(folder: Path) -> "Manifest":
        """Read and check a split's manifest.

        Raises:
            DataError: if the folder or the manifest is missing or does not belong to the shards.
        """
        if not folder.is_dir():
            raise DataError(
                f"data folder {folder} does not exist; make it with 'megatron-eso data prepare' or "
                "change data.sources / data.validation"
            )
        try:
            manifest = Manifest(**json.loads((folder / FILE).read_text()))
        except OSError:
            raise DataError(
                f"data folder {folder} has no {FILE}: it is empty or was not finished; run 'megatron-eso"
                " data prepare' again"
            ) from None
        except (ValueError, TypeError) as error:
            raise DataError(f"{folder / FILE} is damaged: {error}") from None
        if sha256_of(folder / "index.json") != manifest.index_sha256:
            raise DataError(f"{folder}/index.json is not the one its {FILE} was written for")
        return manifest


def sha256_of(path: Path) -> str:
    """Return the hash of a file.

    Raises:
        DataError: if it cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
