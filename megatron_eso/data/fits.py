"""Whether prepared splits fit the run that reads them, and each other, judged by their manifests.

A run checks this when it starts. Commands that start many runs, or one much later, check it first: `sweep
run`, `submit`. On a login node that must be quick, so no numpy is imported here.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_eso.config.schema import DataConfig, RunConfig
from megatron_eso.data.manifest import Manifest, local_split
from megatron_eso.errors import DataError, VocabularyError
from megatron_eso.files import is_remote


def unseen_data(runs: Iterable[RunConfig]) -> list[str]:
    """Check those of the runs' splits that this machine can see; return the others.

    Nothing is fetched or written: for a split that is here, only manifest and tokenizer are read.

    Returns:
        "SETTING=PATH (why)" for each split that only the runs can see.

    Raises:
        DataError: for a split that is here and does not fit, naming the setting.
    """
    unseen: dict[str, None] = {}
    for run in distinct(runs):
        require_sources(run.data)
        sources, held_out = sources_of(run.data), held_out_of(run.data)
        seen: dict[str, Manifest] = {}
        for setting, path in {**sources, **held_out}.items():
            with naming(setting):
                require_path(path)
            why = "in an object store" if is_remote(path) else "not on this machine"
            if is_remote(path) or not os.path.exists(path):
                unseen[f"{setting}={path} ({why})"] = None
                continue
            with naming(setting):
                seen[setting] = local_split(Path(path))
                check_fits(seen[setting], path, **shape_of(run))
        trained = [setting for setting in sources if setting in seen]
        check_alike([sources[s] for s in trained], [seen[s] for s in trained])
        for setting in held_out.keys() & seen.keys() if trained else ():
            with naming(setting):
                tokenizer = seen[trained[0]].tokenizer_sha256
                check_tokenizer(seen[setting], held_out[setting], tokenizer)
    return list(unseen)


def check_fits(manifest: Manifest, path: str, sequence_length: int, vocab_size: int) -> None:
    """Refuse a split whose rows or vocabulary are not the run's.

    Raises:
        DataError: naming the split, both numbers and the setting; of a vocabulary, a VocabularyError.
    """
    if manifest.sequence_length != sequence_length:
        raise DataError(
            f"{path} has rows of {manifest.sequence_length} tokens, but the run asks for "
            f"train.sequence_length={sequence_length}; set it to {manifest.sequence_length} or prepare "
            f"the data with --sequence-length {sequence_length}"
        )
    if manifest.vocab_size != vocab_size:
        raise VocabularyError(
            f"{path} has a vocabulary of {manifest.vocab_size} (mask token included), but "
            f"model.vocab_size={vocab_size}; they must be equal"
        )


def check_alike(paths: Sequence[str], manifests: Sequence[Manifest]) -> None:
    """Refuse a mixture of splits whose tokens mean different text, or are stored differently.

    Raises:
        DataError: naming two splits that differ.
    """
    for path, manifest in zip(paths, manifests, strict=True):
        if manifest.tokenizer_sha256 != manifests[0].tokenizer_sha256:
            raise DataError(
                f"{path} was made with another tokenizer than {paths[0]}; all sources of a mixture need "
                "the same one (data prepare --tokenizer FILE)"
            )
        if manifest.dtype != manifests[0].dtype:
            raise DataError(
                f"{path} stores tokens as {manifest.dtype}, but {paths[0]} as "
                f"{manifests[0].dtype}; prepare both with the same version"
            )


def check_tokenizer(manifest: Manifest, path: str, tokenizer_sha256: str | None) -> None:
    """Refuse a split that another tokenizer made; ``tokenizer_sha256`` None: not known.

    Raises:
        DataError: naming both tokenizers' hashes.
    """
    if tokenizer_sha256 not in (None, manifest.tokenizer_sha256):
        raise DataError(
            f"{path} was made with another tokenizer than the model's data (sha256 "
            f"{manifest.tokenizer_sha256[:12]}, not {tokenizer_sha256[:12]}), so its tokens "
            "stand for other text; prepare it with data prepare --tokenizer FILE"
        )


def require_sources(data: DataConfig) -> None:
    """Refuse a run without training data."""
    if not data.sources:
        raise DataError("data.sources is empty: name at least one prepared split")


def require_path(path: str) -> None:
    """Refuse a data set without an address."""
    if not path:
        raise DataError("the path is empty; name a prepared split")


def sources_of(data: DataConfig) -> dict[str, str]:
    """Return setting -> address of the training data."""
    return {f"data.sources[{i}].path": source.path for i, source in enumerate(data.sources)}


def held_out_of(data: DataConfig) -> dict[str, str]:
    """Return setting -> address of the validation sets."""
    return {f"data.validation.{name}": path for name, path in data.validation.items()}


def shape_of(run: RunConfig) -> dict[str, int]:
    """Return the row length and vocabulary size that every split of a run must have."""
    return {"sequence_length": run.train.sequence_length, "vocab_size": run.model.vocab_size}


def distinct(runs: Iterable[RunConfig]) -> list[RunConfig]:
    """Return one run (the first) for each combination of data and shape of rows."""
    found: list[RunConfig] = []
    for run in runs:
        if not any(run.data == one.data and shape_of(run) == shape_of(one) for one in found):
            found.append(run)
    return found


@contextmanager
def naming(setting: str) -> Iterator[None]:
    """Put the setting in front of an error about its split."""
    try:
        yield
    except DataError as error:
        raise type(error)(f"{setting}: {error}") from None
