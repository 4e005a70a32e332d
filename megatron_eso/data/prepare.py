"""``data prepare``: raw text to a tokenizer and two splits of shards, by many processes.

The request (``prepare.json``) is written first, and a later run compares its own with it. The same request
continues or, if everything is complete, does nothing; another request is refused. Finished partitions are
kept. The manifest of the train split is written last of all.
"""

import multiprocessing
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from megatron_eso.data.claim import (
    FILES_KEY,
    MERGE_ORDER,
    TOKENIZER_NAME,
    WORK_NAME,
    alone,
    claim,
    complete,
    remove_prepared,
)
from megatron_eso.data.documents import Document, documents_of, refuse
from megatron_eso.data.file_kinds import FileChoice
from megatron_eso.data.manifest import Manifest, sha256_of
from megatron_eso.data.merge import merge_partitions
from megatron_eso.data.open_split import default_cache
from megatron_eso.data.output import describe_write_error
from megatron_eso.data.partition import Preparation, PrepareOptions, split_of
from megatron_eso.data.progress import Progress
from megatron_eso.data.publish import Destination
from megatron_eso.data.sources import (
    EVERY_FILE,
    TEXT_KEY,
    Piece,
    find_files,
    partitions_of,
    require_records,
)
from megatron_eso.data.tokenizer import (
    Tokenizer,
    require_trainable,
    resolve_tokenizer,
    tokenizer_file,
    train_tokenizer,
)
from megatron_eso.data.workers import write_partitions
from megatron_eso.errors import DataError
from megatron_eso.files import is_remote


@dataclass(frozen=True)
class Prepared:
    """What a preparation left."""

    manifests: dict[str, Manifest]
    """Split name -> manifest."""
    was_complete: bool
    """True if an earlier run had finished everything."""


def prepare(
    sources: list[str],
    out: Path | str,
    options: PrepareOptions,
    *,
    choice: FileChoice = EVERY_FILE,
    tokenizer: str | None = None,
    tokenizer_bytes: int = 256 << 20,
    num_processes: int | None = None,
    overwrite: bool = False,
    staging: Path | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Prepare ``out/train``, ``out/validation`` and ``out/tokenizer.json`` from the sources.

    Args:
        sources: files, folders, ``stdlib``, ``hf:NAME``.
        out: local folder, or address of an object store (s3://, gs://).
        options: the options that decide the rows.
        choice: which files of folders are read.
        tokenizer: file, folder or published name; None: train one on the text.
        tokenizer_bytes: most bytes of text to train it on.
        num_processes: worker processes; None: one per core. Does not change the result.
        overwrite: remove what is in ``out``, whichever request made it, and start over.
        staging: local folder for work in progress if ``out`` is an object store; None: one for this
            address under the cache folder. Shards of finished partitions leave it.
        progress: where to show progress.

    Raises:
        DataError: for wrong inputs, another request's output or another process in ``out``, bad
            documents, or a full disk.
    """
    check_options(options)
    if tokenizer is None:
        require_trainable(options.vocab_size)
    pieces = find_files(sources, choice)
    require_records(pieces, None if options.text_key == TEXT_KEY else options.text_key)
    _require_both_splits(pieces, options)
    request = _request(sources, pieces, options, tokenizer, tokenizer_bytes)
    destination = Destination(str(out)) if is_remote(str(out)) else None
    folder = Path(out) if destination is None else staging or _staging_of(destination.address)
    _require_elsewhere(tokenizer, folder)
    try:
        if destination is None and not overwrite:  # a complete output is left untouched
            found = complete(folder, request, _splits(options))
            if found is not None:
                return Prepared(found, True)
        with alone(folder):
            found = claim(folder, destination, request, overwrite, _splits(options))
            manifests = found
            if manifests is None:
                path = folder / TOKENIZER_NAME
                if not path.is_file():
                    _make_tokenizer(tokenizer, pieces, path, options, tokenizer_bytes, progress)
                manifests = _write(pieces, folder, destination, options, num_processes, progress)
        if destination is not None:
            with suppress(
                OSError
            ):  # fails, and the folder stays, if an earlier run left files there
                folder.rmdir()
        return Prepared(manifests, found is not None)
    except OSError as error:
        raise DataError(describe_write_error(error, folder)) from error


def check_options(options: PrepareOptions) -> None:
    """Refuse meaningless options.

    Raises:
        DataError: naming the option.
    """
    if options.sequence_length < 1:
        raise DataError(f"--sequence-length {options.sequence_length} must be at least 1")
    if not 0 <= options.validation_fraction < 1:
        raise DataError(
            f"--validation-fraction {options.validation_fraction} must lie between 0 (no validation "
            "split) and 1"
        )
    if options.packing not in ("packed", "separate"):
        raise DataError(f"--packing {options.packing} must be packed or separate")
    if options.bad_documents not in ("error", "skip"):
        raise DataError(f"--bad-documents {options.bad_documents} must be error or skip")
    if options.partition_mib is not None and options.partition_mib < 1:
        raise DataError(f"--partition-mib {options.partition_mib} must be at least 1")
    if not 1 <= options.shard_mib < 4096:
        raise DataError(f"--shard-mib {options.shard_mib} must lie between 1 and 4095")


def _require_elsewhere(tokenizer: str | None, folder: Path) -> None:
    """Refuse a tokenizer from the folder that is written: it would be removed before it is read."""
    file = None if tokenizer is None else tokenizer_file(tokenizer)
    if file is not None and folder.resolve() in file.resolve().parents:
        raise DataError(
            f"--tokenizer {tokenizer} lies in {folder}, whose files this preparation replaces: choose "
            "another --out, or copy the tokenizer to another place and give that"
        )


def _require_both_splits(pieces: list[Piece], options: PrepareOptions) -> None:
    """Refuse text files that all fall in one split: each is one document, and its name decides."""
    if not options.validation_fraction or any(piece.kind != "text" for piece in pieces):
        return
    keys = [piece.key for piece in pieces if piece.num_bytes]
    found = {split_of(Document("", "", key), options.validation_fraction) for key in keys}
    if len(found) < len(MERGE_ORDER):
        raise DataError(
            f"--validation-fraction {options.validation_fraction}: a text file is one document, and all "
            f"{len(keys)} of the sources would go to the {found.pop()} split; set --validation-fraction 0 "
            "for no validation split, or another share, or give the text as several files or as .jsonl "
            "records"
        )


def _splits(options: PrepareOptions) -> tuple[str, ...]:
    """Return the splits in the order in which they are finished."""
    return MERGE_ORDER if options.validation_fraction else MERGE_ORDER[1:]


def _request(
    sources: list[str],
    pieces: list[Piece],
    options: PrepareOptions,
    tokenizer: str | None,
    tokenizer_bytes: int,
) -> dict[str, Any]:
    listing = "\n".join(f"{piece.key} {piece.num_bytes}" for piece in pieces)
    file = None if tokenizer is None else tokenizer_file(tokenizer)
    known = tokenizer if file is None else sha256_of(file)
    return {
        "sources": sources,
        FILES_KEY: sha256(listing.encode(errors="surrogatepass")).hexdigest(),
        "tokenizer": known or f"trained on {tokenizer_bytes} bytes",
        **asdict(options),
    }


def _staging_of(address: str) -> Path:
    return default_cache() / "prepare" / sha256(address.encode()).hexdigest()[:16]


def _make_tokenizer(
    name: str | None,
    pieces: list[Piece],
    path: Path,
    options: PrepareOptions,
    num_bytes: int,
    progress: Progress | None,
) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    if name is not None:
        resolve_tokenizer(name, temporary)
    else:
        if progress is not None:
            progress.say(f"training a tokenizer of {options.vocab_size - 1} tokens")
        texts = _training_texts(pieces, options, num_bytes)
        first = next(texts, None)
        if first is None:
            _refuse_training(pieces, options)
        train_tokenizer(chain([first], texts), vocab_size=options.vocab_size, path=temporary)
    temporary.replace(path)


def _refuse_training(pieces: list[Piece], options: PrepareOptions) -> NoReturn:
    documents = (d for piece in pieces for d in documents_of(piece, text_key=options.text_key))
    bad = next((document for document in documents if document.problem is not None), None)
    if bad is None:
        raise DataError(
            f"--validation-fraction {options.validation_fraction} leaves no document to train on"
        )
    raise DataError(
        f"no document of the sources can be used: the first, {bad.where}, {bad.problem}"
    )


def _training_texts(pieces: list[Piece], options: PrepareOptions, num_bytes: int) -> Iterator[str]:
    """Yield training text of at most ``num_bytes`` of UTF-8, an equal share from the start of each file.

    What short files leave is shared among the others in another round. File sizes play no role, so the same
    text gives the same tokenizer, compressed or not.
    """
    left, taken = num_bytes, dict.fromkeys(range(len(pieces)), 0)
    while taken and left >= len(taken):
        share = left // len(taken)
        for number, begin in list(taken.items()):
            num_read = 0
            for part in _training_bytes(pieces[number], options, begin, begin + share):
                num_read += len(part)
                yield part.decode(errors="ignore")  # a character cut in two is left out
            left -= num_read
            if num_read < share:
                del taken[number]
            else:
                taken[number] += share


def _training_bytes(piece: Piece, options: PrepareOptions, begin: int, end: int) -> Iterator[bytes]:
    """Yield the text of a file's training documents, from byte ``begin`` of all their text to ``end``."""
    position = 0
    for document in documents_of(piece, text_key=options.text_key):
        if document.problem is not None and options.bad_documents == "error":
            refuse(document)  # now, not only after the training
        if document.problem is None and split_of(document, options.validation_fraction) == "train":
            text = document.text.encode()
            part = text[max(begin - position, 0) : end - position]
            position += len(text)
            if part:
                yield part
            if position >= end:
                return


def _write(
    pieces: list[Piece],
    folder: Path,
    destination: Destination | None,
    options: PrepareOptions,
    num_processes: int | None,
    progress: Progress | None,
) -> dict[str, Manifest]:
    """Write what is missing: partitions, then splits, then what an object store lacks."""
    tokenizer = Tokenizer(folder / TOKENIZER_NAME)
    tokenizer.check_vocabulary(options.vocab_size, "--vocab-size")
    partitions = partitions_of(pieces, options.partition_mib and options.partition_mib << 20)
    address = destination.address if destination else None
    preparation = Preparation(folder / WORK_NAME, tokenizer.path, options, address)
    count = num_processes or multiprocessing.cpu_count()
    write_partitions(partitions, preparation, num_processes=count, progress=progress)
    manifests = _merge(preparation, folder, len(partitions), tokenizer)
    if destination is not None:
        _publish(folder, destination, _splits(options))
    return manifests


def _merge(
    preparation: Preparation, out: Path, num_partitions: int, tokenizer: Tokenizer
) -> dict[str, Manifest]:
    are_sent = preparation.address is not None
    manifests = {
        split: merge_partitions(
            preparation.work, out, split, num_partitions, tokenizer, preparation.options,
            are_sent=are_sent,
        )
        for split in _splits(preparation.options)
    }  # fmt: skip
    if not are_sent:
        shutil.rmtree(preparation.work)
    return manifests


def _publish(folder: Path, destination: Destination, splits: tuple[str, ...]) -> None:
    """Send the other files of the data set, the train manifest last; then empty the folder."""
    destination.write(TOKENIZER_NAME, (folder / TOKENIZER_NAME).read_bytes())
    for split in splits:
        destination.send_split(folder, split)
    remove_prepared(folder)
