"""What a checkpoint or an exported folder holds, without loading it."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_eso.errors import CheckpointError
from megatron_eso.export.describe import read_facts
from megatron_eso.export.exporter import not_exported
from megatron_eso.export.mapping import inexpressible, rules
from megatron_eso.export.safetensors_writer import NAMES
from megatron_eso.export.source import Source, open_source


@dataclass(frozen=True)
class Line:
    """One tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    becomes: str
    """Exported name(s), or why there are none; for an exported tensor, its file."""


@dataclass(frozen=True)
class Inspection:
    """The tensors, the number of parameters of a model made of them, and remarks."""

    lines: list[Line]
    num_parameters: int
    remarks: list[str]


def inspect(path: Path) -> Inspection:
    """Return what a checkpoint, a run or an exported folder holds.

    Raises:
        CheckpointError: if it is none of these.
    """
    if list(path.glob("*.safetensors")):
        return _exported(path)
    source = open_source(path, use_ema=True)  # as export does by default
    return Inspection(_lines(source), _num_parameters(source), _remarks(source))


def _lines(source: Source) -> list[Line]:
    reasons = inexpressible(source.model, source.objective.name)
    table = {} if reasons else {rule.ours: ", ".join(rule.theirs) for rule in rules(source.model)}
    lines = []
    for name, stored in sorted(source.reader.tensors.items()):
        kind, _, ours = name.partition(".")
        becomes = table.get(ours, "no place in the export")
        if kind not in ("weights", "ema"):
            becomes = "optimizer state: only training needs it"
        lines.append(Line(name, stored.shape, NAMES.get(stored.dtype, str(stored.dtype)), becomes))
    return lines


def _num_parameters(source: Source) -> int:
    stored = [t for n, t in source.reader.tensors.items() if n.startswith("weights.")]
    return sum(int(torch.Size(t.shape).numel()) for t in stored)


def _remarks(source: Source) -> list[str]:
    remarks = [
        f"step {source.folder.step}, objective {source.objective.name}, "
        f"alpha_0 = {source.objective.alpha_0}"
    ]
    reasons = inexpressible(source.model, source.objective.name)
    if source.objective.name == "ar":
        reasons.append(
            "objective.name=ar: a next-token model, exported only with --format backbone"
        )
    remarks += [f"cannot be exported: {reason}" for reason in reasons]
    remarks += [f"not exported: {reason}" for reason in not_exported(source)]
    return remarks


def _exported(path: Path) -> Inspection:
    lines, count = [], 0
    for file in sorted(path.glob("*.safetensors")):
        for name, entry in read_header(file).items():
            shape = tuple(entry["shape"])
            lines.append(Line(name, shape, entry["dtype"], file.name))
            count += int(torch.Size(shape).numel())
    remarks = []
    content = read_facts(path)
    if content:
        remarks.append(
            f"from {content['source']}, step {content['step']}, {content['weights']} weights"
        )
        remarks += [f"not exported: {reason}" for reason in content["not_exported"]]
        remarks += content.get("remarks", [])
    return Inspection(lines, count, remarks)


def read_header(path: Path) -> dict[str, dict]:
    """Return the tensors of a safetensors file by name: dtype, shape and place in the data.

    Raises:
        CheckpointError: if it is not such a file.
    """
    try:
        with open(path, "rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(size))
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from None
    header.pop("__metadata__", None)
    return header
