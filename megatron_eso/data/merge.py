"""Merge finished partitions into one split: shards renamed in order, one index, and last the manifest.

This is stricter than streaming's ``merge_index``, which skips unfinished partitions and cannot run twice.
Here the number of partitions must be the planned one, and an interrupted merge is simply run again.
"""

import json
import os
from pathlib import Path
from typing import Any

from megatron_eso.data.manifest import (
    INDEX_NAME,
    Manifest,
    sha256_of,
)
from megatron_eso.data.partition import PART_NAME, PrepareOptions, SplitCounts
from megatron_eso.data.publish import renamed
from megatron_eso.data.tokenizer import Tokenizer
from megatron_eso.errors import DataError
from megatron_eso.files import write_whole


def merge_partitions(
    work: Path,
    out: Path,
    split: str,
    num_partitions: int,
    tokenizer: Tokenizer,
    options: PrepareOptions,
    *,
    are_sent: bool = False,
) -> Manifest:
    """Move all partitions' shards of a split to ``out/split``, write its index, and return its manifest.

    Args:
        work: folder of the finished partitions.
        out: folder of the data set.
        split: name of the split.
        num_partitions: how many there must be.
        tokenizer: the tokenizer that made the tokens.
        options: the options that decided the rows.
        are_sent: the shards are in an object store, under their partitions' names; only index and
            manifest are written.

    Raises:
        DataError: if a partition is missing or the split has no rows.
    """
    target = out / split
    target.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Any]] = []
    total = SplitCounts()
    for number in range(num_partitions):
        part = work / f"part-{number:05d}"
        if not (part / PART_NAME).is_file():
            raise DataError(f"partition {number} of {num_partitions} is missing under {work}")
        counts = json.loads((part / PART_NAME).read_text())[split]
        for name, value in counts.items():
            setattr(total, name, getattr(total, name) + value)
        for entry in json.loads((part / split / INDEX_NAME).read_text())["shards"]:
            shards.append(
                renamed(entry, part.name)
                if are_sent
                else _moved(entry, part / split, target, len(shards))
            )
    if not shards:
        raise DataError(
            f"the {split} split got no documents; "
            + ("change --validation-fraction" if split == "validation" else "give more text")
        )
    write_whole(target / INDEX_NAME, json.dumps({"version": 2, "shards": shards}, sort_keys=True))
    manifest = Manifest(
        split=split,
        tokenizer_file="../tokenizer.json",
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=options.vocab_size,
        sequence_length=options.sequence_length,
        dtype=options.dtype,
        packing=options.packing,
        end_of_document_id=tokenizer.end_of_document_id,
        num_shards=len(shards),
        index_sha256=sha256_of(target / INDEX_NAME),
        **vars(total),
    )
    manifest.save(target)
    return manifest


def renumbered(entry: dict[str, Any], number: int) -> tuple[dict[str, Any], str]:
    """Return a shard's index entry under another number, and the key of its stored file."""
    moved = dict(entry)
    for kind in ("raw_data", "zip_data"):
        if entry[kind]:
            suffix = entry[kind]["basename"].split(".", 2)[2]
            moved[kind] = {**entry[kind], "basename": f"shard.{number:05d}.{suffix}"}
    stored = "zip_data" if entry["zip_data"] else "raw_data"
    return moved, stored


def _moved(entry: dict[str, Any], source: Path, target: Path, number: int) -> dict[str, Any]:
    """Move one shard's file to its place in the split; return its index entry."""
    moved, stored = renumbered(entry, number)
    before, after = source / entry[stored]["basename"], target / moved[stored]["basename"]
    if before.exists():
        os.replace(before, after)
    elif not after.exists():
        raise DataError(f"shard {before} is missing; remove {source.parent} and run again")
    return moved
