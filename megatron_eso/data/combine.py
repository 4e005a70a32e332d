"""``data merge`` and ``data mix``: join prepared splits, and compute what a mixture will consume."""

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_eso.config.schema import DataConfig
from megatron_eso.data.manifest import INDEX_NAME, PREPARE_AGAIN, Manifest, load_manifest, sha256_of
from megatron_eso.data.merge import renumbered
from megatron_eso.data.mixture import Mixture
from megatron_eso.data.open_split import open_sources
from megatron_eso.data.output import new_folder
from megatron_eso.errors import DataError
from megatron_eso.files import write_whole

SAME = ("tokenizer_sha256", "vocab_size", "sequence_length", "dtype", "packing")
SUMMED = ("num_samples", "num_tokens", "num_documents", "text_bytes", "num_skipped", "num_shards")


@dataclass(frozen=True)
class SourceUse:
    """What a run takes from one source of a mixture."""

    path: str
    share: float
    """Share of the run's rows."""
    num_samples: int
    """Rows that the run reads."""
    epochs: float
    """How often each row of the source is read, on average."""


def merge_splits(folders: list[Path], out: Path) -> Manifest:
    """Join local splits of one tokenizer into a new split; return its manifest.

    Shards are hard-linked or copied.

    Raises:
        DataError: if the splits do not fit together or share shards, or ``out`` is not empty.
    """
    manifests = [load_manifest(folder) for folder in folders]
    _check_alike(folders, manifests)
    with new_folder(out) as temporary:
        shards: list[dict[str, Any]] = []
        for folder in folders:
            for entry in json.loads((folder / INDEX_NAME).read_bytes())["shards"]:
                shards.append(_linked(entry, folder, temporary, len(shards)))
        _refuse_duplicates(shards)
        index = json.dumps({"version": 2, "shards": shards}, sort_keys=True)
        write_whole(temporary / INDEX_NAME, index)
        tokenizer = folders[0] / manifests[0].tokenizer_file
        shutil.copyfile(tokenizer, temporary / "tokenizer.json")
        sums = {name: sum(getattr(manifest, name) for manifest in manifests) for name in SUMMED}
        merged = replace(
            manifests[0],
            tokenizer_file="tokenizer.json",
            index_sha256=sha256_of(temporary / INDEX_NAME),
            **sums,
        )
        merged.save(temporary)
    return merged


def mixture_use(
    data: DataConfig, num_samples: int, *, sequence_length: int, vocab_size: int, seed: int = 0
) -> list[SourceUse]:
    """Return what the first ``num_samples`` rows of a run take from each source.

    Raises:
        DataError: for sources that the run would refuse.
    """
    splits = open_sources(data, sequence_length=sequence_length, vocab_size=vocab_size)
    mixture = Mixture([source.weight for source in data.sources], seed=seed)
    counts = mixture.consumed(num_samples)
    return [
        SourceUse(source.path, share / mixture.period, count, count / split.num_samples)
        for source, share, count, split in zip(
            data.sources, mixture.shares, counts, splits, strict=True
        )
    ]


def _check_alike(folders: list[Path], manifests: list[Manifest]) -> None:
    for folder, manifest in zip(folders, manifests, strict=True):
        for name in SAME:
            first, other = getattr(manifests[0], name), getattr(manifest, name)
            if first != other:
                raise DataError(
                    f"{folder} has {name}={other}, but {folders[0]} has {first}: they cannot be merged"
                )


def _linked(entry: dict[str, Any], folder: Path, target: Path, number: int) -> dict[str, Any]:
    renamed, stored = renumbered(entry, number)
    before, after = folder / entry[stored]["basename"], target / renamed[stored]["basename"]
    if not before.is_file():
        raise DataError(f"shard {before} is missing; restore it or {PREPARE_AGAIN}")
    try:
        os.link(before, after)
    except OSError:  # another file system
        shutil.copyfile(before, after)
    return renamed


def _refuse_duplicates(shards: list[dict[str, Any]]) -> None:
    seen: dict[str, str] = {}
    for entry in shards:
        key, name = (
            json.dumps(entry["raw_data"]["hashes"], sort_keys=True),
            entry["raw_data"]["basename"],
        )
        if entry["raw_data"]["hashes"] and key in seen:
            raise DataError(
                f"two of the splits hold the same shard (it would become both {seen[key]} and {name}); "
                "name each split once"
            )
        seen[key] = name
