"""``data prepare``: raw text to a tokenizer and two splits of shards, by many processes.

The account of what was asked (``prepare.json``) is written first and compared by a later run: the same
request continues or, when complete, does nothing; another one is refused. Partitions that were
finished are kept; the manifest of the train split is written last of all.
"""

import json
import multiprocessing
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from megatron_eso.data.documents import documents_of
from megatron_eso.data.manifest import (
    MANIFEST_NAME,
    Manifest,
    load_manifest,
    sha256_of,
)
from megatron_eso.data.merge import merge_partitions
from megatron_eso.data.open_split import default_cache, is_remote
from megatron_eso.data.output import describe_write_error
from megatron_eso.data.partition import Preparation, PrepareOptions, split_of
from megatron_eso.data.progress import Progress
from megatron_eso.data.publish import Destination
from megatron_eso.data.sources import Piece, find_files, partitions_of
from megatron_eso.data.tokenizer import Tokenizer, resolve_tokenizer, train_tokenizer
from megatron_eso.data.workers import write_partitions
from megatron_eso.errors import DataError
from megatron_eso.files import write_json

REQUEST_NAME = "prepare.json"
TOKENIZER_NAME = "tokenizer.json"
WORK_NAME = "work"
MERGE_ORDER = ("validation", "train")  # train last: its manifest says that everything is there


@dataclass(frozen=True)
class Prepared:
    """What a preparation left."""

    manifests: dict[str, Manifest]
    """Split name -> manifest."""
    was_complete: bool
    """True if an earlier run had done everything."""


def prepare(
    sources: list[str],
    out: Path | str,
    options: PrepareOptions,
    *,
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
        options: what decides the rows.
        tokenizer: file, folder or published name; None: train one on the text.
        tokenizer_bytes: bytes of text to train it on, at most.
        num_processes: worker processes; None: one per core. It does not change the result.
        overwrite: remove what another request left in ``out``.
        staging: local folder for work in progress if ``out`` is an object store; None: one for this
            address under the cache folder. Finished partitions leave it.
        progress: where to show progress.

    Raises:
        DataError: for wrong inputs, another request's output in ``out``, bad documents, no space.
    """
    check_options(options)
    pieces = find_files(sources)
    request = _request(sources, pieces, options, tokenizer, tokenizer_bytes)
    destination = Destination(str(out)) if is_remote(str(out)) else None
    folder = Path(out) if destination is None else staging or _staging_of(destination.address)
    try:
        complete = _claim(folder, destination, request, overwrite, _splits(options))
        if complete is not None:
            return Prepared(complete, True)
        path = folder / TOKENIZER_NAME
        if not path.is_file():
            _make_tokenizer(tokenizer, pieces, path, options, tokenizer_bytes, progress)
        loaded = Tokenizer(path)
        loaded.check_vocabulary(options.vocab_size, "--vocab-size")
        partitions = partitions_of(pieces, options.partition_mib and options.partition_mib << 20)
        address = destination.address if destination else None
        preparation = Preparation(folder / WORK_NAME, path, options, address)
        count = num_processes or multiprocessing.cpu_count()
        write_partitions(partitions, preparation, num_processes=count, progress=progress)
        manifests = _merge(preparation, folder, len(partitions), loaded)
        if destination is not None:
            _publish(folder, destination, _splits(options))
        return Prepared(manifests, False)
    except OSError as error:
        raise DataError(describe_write_error(error, folder)) from error


def check_options(options: PrepareOptions) -> None:
    """Refuse options without a meaning.

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
    given = (
        Path(tokenizer) / TOKENIZER_NAME if tokenizer and Path(tokenizer).is_dir() else tokenizer
    )
    known = sha256_of(Path(given)) if given and Path(given).is_file() else given
    return {
        "sources": sources,
        "files (names and sizes)": sha256(listing.encode()).hexdigest(),
        "tokenizer": known or f"trained on {tokenizer_bytes} bytes",
        **asdict(options),
    }


def _claim(
    folder: Path,
    destination: Destination | None,
    request: dict[str, Any],
    overwrite: bool,
    splits: tuple[str, ...],
) -> dict[str, Manifest] | None:
    """Note the request where the output goes, or refuse it if another one's output stands there.

    Returns:
        The manifests if an earlier run with this request had done everything.
    """
    if destination is None:
        _claim_folder(folder, request, overwrite)
        is_complete = (folder / "train" / MANIFEST_NAME).is_file()
        return {split: load_manifest(folder / split) for split in splits} if is_complete else None
    earlier = destination.claim(REQUEST_NAME, request)
    if earlier == request:
        complete = destination.manifests(splits)
        if complete is not None:
            return complete
    else:  # what an earlier run left in the staging folder is not there any more
        if earlier is not None:
            _refuse_another(destination.address, earlier, request, overwrite)
            destination.replace(REQUEST_NAME, request, [*MERGE_ORDER, TOKENIZER_NAME])
        if (folder / REQUEST_NAME).is_file():
            _remove_prepared(folder)
    _claim_folder(folder, request, overwrite=True)
    return None


def _claim_folder(out: Path, request: dict[str, Any], overwrite: bool) -> None:
    path = out / REQUEST_NAME
    if path.is_file():
        earlier = json.loads(path.read_text())
        if earlier != request:
            if any((out / name).exists() for name in (*MERGE_ORDER, WORK_NAME)):
                _refuse_another(str(out), earlier, request, overwrite)
            _remove_prepared(out)
    elif out.is_dir() and any(out.iterdir()):
        raise DataError(
            f"{out} is not empty and was not made by data prepare; choose another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, request)


def _refuse_another(
    out: str, earlier: dict[str, Any], request: dict[str, Any], overwrite: bool
) -> None:
    keys = [key for key in request | earlier if request.get(key) != earlier.get(key)]
    if not overwrite:
        changes = "; ".join(f"{k}: {earlier.get(k)} -> {request.get(k)}" for k in keys)
        raise DataError(
            f"{out} was prepared from another request ({changes}); choose another --out, or add "
            "--overwrite to remove what is there"
        )


def _staging_of(address: str) -> Path:
    return default_cache() / "prepare" / sha256(address.encode()).hexdigest()[:16]


def _remove_prepared(out: Path) -> None:
    (out / REQUEST_NAME).unlink()
    (out / TOKENIZER_NAME).unlink(missing_ok=True)
    for name in (*MERGE_ORDER, WORK_NAME):
        if (out / name).is_dir():
            shutil.rmtree(out / name)


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
        train_tokenizer(texts, vocab_size=options.vocab_size, path=temporary)
    temporary.replace(path)


def _training_texts(pieces: list[Piece], options: PrepareOptions, num_bytes: int) -> Iterator[str]:
    """Yield training documents, evenly from all files, of at most ``num_bytes`` in all."""
    share = min(1.0, num_bytes / sum(piece.num_bytes for piece in pieces))
    for piece in pieces:
        left = piece.num_bytes * share
        for document in documents_of(piece, text_key=options.text_key):
            if left <= 0:
                break
            if (
                document.problem is None
                and split_of(document, options.validation_fraction) == "train"
            ):
                text = document.text[: int(left) + 1]
                left -= len(text)
                yield text


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
    """Send what the shards need to be a data set, the train manifest last; empty the folder."""
    destination.write(TOKENIZER_NAME, (folder / TOKENIZER_NAME).read_bytes())
    for split in splits:
        destination.send_split(folder, split)
    _remove_prepared(folder)
    folder.rmdir()
