"""Turn text into two splits of MDS shards, a tokenizer and manifests.

Documents are packed one after another with a separator between them and cut into samples of L + 1
tokens with stride L. A folder under its final name is always complete: shards are written to
``<split>.part`` and the manifest last, before the rename.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from megatron_eso.data.corpora import Document, documents, is_validation
from megatron_eso.data.manifest import FILE, Manifest, sha256_of
from megatron_eso.data.streaming_shim import mds_writer
from megatron_eso.data.tokenizer import end_of_document_id, load_tokenizer, train_tokenizer
from megatron_eso.errors import DataError

TOKENIZER = "tokenizer.json"
SPLITS = ("train", "validation")
_BATCH = 64  # documents tokenized at once (the tokenizer runs them on all cores)


@dataclass(frozen=True)
class Request:
    """What to prepare; two equal requests give the same shards."""

    sources: tuple[str, ...]
    sequence_length: int
    vocab_size: int | None
    """Size of the tokenizer to train, mask included; None with ``tokenizer``."""
    tokenizer: str | None
    """An existing tokenizer.json."""
    validation_fraction: float
    shard_bytes: int = 1 << 26

    def text(self) -> str:
        """Return the request as JSON, for the manifest."""
        return json.dumps(self.__dict__, sort_keys=True, default=list)


def prepare(request: Request, out: Path, *, say: Callable[[str], None], overwrite: bool = False):
    """Write tokenizer.json, train/ and validation/ under ``out``.

    Args:
        request: what to prepare.
        out: output folder; a complete one made by the same request is left alone.
        say: receives progress lines.
        overwrite: replace a folder made by another request.

    Raises:
        DataError: for bad input, or an output folder made by another request.
    """
    if _is_complete(request, out, overwrite):
        say(f"{out} is complete; nothing to do")
        return
    out.mkdir(parents=True, exist_ok=True)
    texts = [d for source in request.sources for d in documents(source)]
    held_out = [is_validation(d, request.validation_fraction) for d in texts]
    splits = {
        "train": [d for d, held in zip(texts, held_out, strict=True) if not held],
        "validation": [d for d, held in zip(texts, held_out, strict=True) if held],
    }
    say(f"{len(texts)} documents, {sum(len(d.text) for d in texts) / 1e6:.1f} M characters")
    tokenizer = _tokenizer(request, splits["train"], out, say)
    for split in SPLITS:
        manifest = write_split(request, splits[split], tokenizer, out, split)
        say(f"{split}: {manifest.num_tokens:,} tokens in {manifest.num_samples:,} samples")


def write_split(
    request: Request, texts: list[Document], tokenizer: Tokenizer, out: Path, split: str
) -> Manifest:
    """Write one split and return its manifest."""
    length, vocab_size = request.sequence_length, tokenizer.get_vocab_size() + 1
    dtype = "uint16" if vocab_size <= 65536 else "uint32"
    part, final = out / f"{split}.part", out / split
    shutil.rmtree(part, ignore_errors=True)
    separator = end_of_document_id(tokenizer)
    stream = _token_stream(texts, tokenizer, separator)
    num_tokens = num_samples = 0
    rest = np.zeros(0, dtype=dtype)
    with mds_writer(
        columns={"tokens": f"ndarray:{dtype}:{length + 1}"},
        out=str(part),
        hashes=["xxh64"],
        size_limit=request.shard_bytes,
    ) as writer:
        for ids in stream:
            num_tokens += len(ids)
            rest = np.concatenate([rest, ids.astype(dtype)])
            first = 0
            while first + length + 1 <= len(rest):
                writer.write({"tokens": rest[first : first + length + 1]})
                first += length
                num_samples += 1
            rest = rest[first:]
    if num_samples == 0:
        shutil.rmtree(part, ignore_errors=True)
        raise DataError(
            f"the {split} split has {num_tokens} tokens, fewer than one sample of {length + 1}; give "
            "more text, a shorter --sequence-length, or another --validation-fraction"
        )
    manifest = Manifest(
        sequence_length=length,
        vocab_size=vocab_size,
        dtype=dtype,
        tokenizer_sha256=sha256_of(out / TOKENIZER),
        end_of_document_id=separator,
        num_documents=len(texts),
        num_tokens=num_tokens,
        num_samples=num_samples,
        text_bytes=sum(len(d.text.encode()) for d in texts),
        index_sha256=hashlib.sha256((part / "index.json").read_bytes()).hexdigest(),
        request=request.text(),
    )
    manifest.save(part)
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)
    return manifest


def _token_stream(
    texts: list[Document], tokenizer: Tokenizer, separator: int
) -> Iterable[np.ndarray]:
    for first in range(0, len(texts), _BATCH):
        batch = [d.text for d in texts[first : first + _BATCH]]
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            yield np.array([*encoding.ids, separator], dtype=np.int64)


def _tokenizer(
    request: Request, train: list[Document], out: Path, say: Callable[[str], None]
) -> Tokenizer:
    if request.tokenizer is not None:
        tokenizer = load_tokenizer(Path(request.tokenizer))
    else:
        say(f"training a byte-level BPE with {request.vocab_size} ids (mask included)")
        tokenizer = train_tokenizer((d.text for d in train), request.vocab_size or 0)
    tokenizer.save(str(out / TOKENIZER))
    return tokenizer


def _is_complete(request: Request, out: Path, overwrite: bool) -> bool:
    """Return whether ``out`` holds this request's result; refuse or clear another's."""
    present = [split for split in SPLITS if (out / split / FILE).is_file()]
    if not present:
        return False
    stored = [Manifest.load(out / split).request for split in present]
    if len(present) == len(SPLITS) and all(text == request.text() for text in stored):
        return True
    if all(text == request.text() for text in stored):
        return False  # interrupted between the splits
    if not overwrite:
        old, new = json.loads(stored[0]), json.loads(request.text())
        changed = [
            f"{k}: {old.get(k)!r} there, {new[k]!r} asked" for k in new if old.get(k) != new[k]
        ]
        raise DataError(
            f"{out} was prepared with other settings ({'; '.join(changed)}); choose another --out or "
            "add --overwrite"
        )
    for split in present:
        shutil.rmtree(out / split)
    return False
