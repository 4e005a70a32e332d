"""Hugging Face weights in (Llama, Qwen3, our own exports), one of our checkpoints out, tensor by tensor.

A model without a mask token gets one: one more id, whose embedding is the mean of the others. All numbers
are kept exactly (float32 holds bfloat16 and float16 exactly).
"""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_eso.checkpoint.folder import FORMAT_VERSION, SIDECAR, CheckpointFolder
from megatron_eso.config.schema import ModelConfig, ObjectiveConfig
from megatron_eso.data.tokenizer import Tokenizer
from megatron_eso.errors import CheckpointError, DataError
from megatron_eso.export.describe import read_facts
from megatron_eso.export.exporter import require_free, require_room, scratch_beside
from megatron_eso.export.hf_layout import has_mask, model_of, objective_of
from megatron_eso.export.inspect_tensors import read_header
from megatron_eso.export.mapping import Rule, rules, shape_of
from megatron_eso.export.streamed import ExportedTensors
from megatron_eso.export.torch_dist_writer import TorchDistWriter
from megatron_eso.files import write_json

_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")


@dataclass(frozen=True)
class Imported:
    """What was written."""

    folder: CheckpointFolder
    model: ModelConfig
    sequence_length: int
    num_parameters: int
    has_mask: bool
    """True if the weights had a row for the mask token; else it is new."""
    remarks: list[str]


@dataclass(frozen=True)
class Described:
    """What a folder says about its model, in our terms."""

    model_type: str
    model: ModelConfig
    """The vocabulary includes the mask token."""
    num_stored_ids: int
    """Rows of embedding and head in the stored weights."""
    objective: ObjectiveConfig
    sequence_length: int
    tokenizer: Tokenizer | None
    has_mask: bool
    """True if the weights already have a row for the mask token."""
    remarks: list[str]


def import_hf(
    source: Path,
    out: Path,
    *,
    cut_vocabulary: bool = False,
    sequence_length: int | None = None,
    tokenizer: Path | None = None,
) -> Imported:
    """Write a checkpoint from a folder with config.json and safetensors weights.

    Args:
        source: folder of transformers' files.
        out: folder of the new checkpoint; must not exist or must be empty.
        cut_vocabulary: drop embedding rows beyond the tokenizer's ids, so that data prepared with that
            tokenizer fits; otherwise every row is kept.
        sequence_length: tokens in a training row; None: as recorded in our export, else 1024; at most
            the model's longest.
        tokenizer: ``tokenizer.json`` to keep beside the weights; None: the one in the folder.

    Raises:
        CheckpointError: if the model cannot be read or expressed, or ``out`` is not empty.
        DataError: if the given ``tokenizer`` cannot be read.
    """
    require_free(out)
    known = describe_hf(
        source, cut_vocabulary=cut_vocabulary, sequence_length=sequence_length, tokenizer=tokenizer
    )
    model = known.model
    tensors = ExportedTensors(source)
    table = rules(model)
    _require_names(tensors, table, model)
    with scratch_beside(out) as scratch:
        require_room(out, 4 * _num_numbers(source, tensors))
        count = 0
        with TorchDistWriter(scratch) as writer:
            for rule, layer in _work(table, model.num_layers):
                whole = _joined(tensors, rule, layer, known)
                count += whole.numel()
                writer.write(
                    f"weights.{rule.ours}", whole, layer=layer, num_layers=model.num_layers
                )
        if known.tokenizer is not None:
            shutil.copyfile(known.tokenizer.path, scratch / "tokenizer.json")
        sidecar = {
            "format_version": FORMAT_VERSION,
            "step": 0,
            "has_ema": False,
            "model": asdict(model),
            "objective": asdict(known.objective),
            "sequence_length": known.sequence_length,
            "mask_token_id": model.vocab_size - 1,
            "data": {},
            "tokenizer": None if known.tokenizer is None else "tokenizer.json",
            "parallel": {},
            "origin": {"format": "hf", "model_type": known.model_type, "folder": source.name},
        }
        write_json(scratch / SIDECAR, sidecar)
        CheckpointFolder(scratch).commit()
    return Imported(
        CheckpointFolder(out), model, known.sequence_length, count, known.has_mask, known.remarks
    )


def describe_hf(
    source: Path,
    *,
    cut_vocabulary: bool = False,
    sequence_length: int | None = None,
    tokenizer: Path | None = None,
) -> Described:
    """Return what the folder says about its model; arguments and errors as in :func:`import_hf`."""
    config, facts = _read_config(source), read_facts(source)
    model = model_of(config)
    objective, remarks = objective_of(config, facts)
    words, more = _tokenizer(source, tokenizer)
    remarks += more
    num_stored = model.vocab_size
    rows = num_stored - int(has_mask(config))
    if cut_vocabulary:
        if words is None:
            raise CheckpointError(
                "--cut-vocabulary needs a tokenizer.json beside the weights, or --tokenizer FILE"
            )
        rows = min(rows, words.vocab_size - 1)
    model = replace(model, vocab_size=rows + 1)
    if words is not None and words.vocab_size != model.vocab_size:
        is_spare = words.vocab_size < model.vocab_size
        remarks.append(
            f"the tokenizer has {words.vocab_size - 1} ids, but the embedding {rows}: to train on text "
            "prepared with it, import with "
            + (
                "--cut-vocabulary"
                if is_spare
                else "--tokenizer and the file the model was trained with"
            )
        )
    if sequence_length is not None and sequence_length > model.max_length:
        raise CheckpointError(
            f"--sequence-length {sequence_length} is more than the model's max_position_embeddings="
            f"{model.max_length}; give at most that"
        )
    length = sequence_length or min(facts.get("sequence_length", 1024), model.max_length)
    return Described(
        config["model_type"], model, num_stored, objective, length, words, has_mask(config), remarks
    )


def _read_config(source: Path) -> dict[str, Any]:
    try:
        config = json.loads((source / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{source}/config.json cannot be read ({error}); give a folder with config.json and "
            "safetensors weights"
        ) from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{source}/config.json does not hold settings (it is not an object)")
    return config


def _tokenizer(source: Path, asked: Path | None) -> tuple[Tokenizer | None, list[str]]:
    if asked is not None:
        return Tokenizer(asked, requires_end=False), []
    path = source / "tokenizer.json"
    if not path.is_file():
        return None, ["no tokenizer.json: sampling and export will ask for one"]
    try:
        return Tokenizer(path, requires_end=False), []
    except DataError as error:
        return None, [f"the tokenizer is left out: {error}"]


def _work(table: list[Rule], num_layers: int) -> Iterator[tuple[Rule, int | None]]:
    for rule in table:
        yield from ((rule, layer) for layer in (range(num_layers) if rule.is_layered else (None,)))


def _require_names(tensors: ExportedTensors, table: list[Rule], model: ModelConfig) -> None:
    wanted = {n.format(i) for r, i in _work(table, model.num_layers) for n in r.theirs}
    # Old files repeat tied weights and keep the rotary buffer.
    extra = {n for n in tensors.files if n.endswith("rotary_emb.inv_freq")}
    extra |= {"lm_head.weight"} if model.tie_embeddings else set()
    wrong = [f"{name} is missing" for name in sorted(wanted - set(tensors.files))]
    wrong += [f"{n} has no place here" for n in sorted(set(tensors.files) - wanted - extra)]
    if model.tie_embeddings and "lm_head.weight" in tensors.files:
        wrong += _head_of_its_own(tensors)
    if wrong:
        raise CheckpointError(f"{tensors.folder} cannot be imported:\n  - " + "\n  - ".join(wrong))


def _head_of_its_own(tensors: ExportedTensors) -> list[str]:
    """Return what is wrong with a stored head that config.json says is tied to the embedding."""
    if torch.equal(tensors.read("lm_head.weight"), tensors.read("model.embed_tokens.weight")):
        return []
    return [
        "lm_head.weight is not the embedding, though config.json ties them (transformers would not tie "
        "these); set tie_word_embeddings to false there"
    ]


def _joined(tensors: ExportedTensors, rule: Rule, layer: int | None, known: Described) -> Tensor:
    """Return one of our tensors, in float32."""
    model = known.model
    names = [name.format(layer) for name in rule.theirs]
    parts = [tensors.read(name).float() for name in names]
    shapes = rule.transform.shapes(model, shape_of(rule, model))
    is_vocabulary = rule.theirs[0] in _VOCABULARY
    if is_vocabulary:
        shapes = [(known.num_stored_ids, *shape[1:]) for shape in shapes]
    found = [tuple(part.shape) for part in parts]
    if found != shapes:
        raise CheckpointError(
            f"{', '.join(names)}: shapes {found}, but by config.json {shapes}; correct "
            "vocab_size, hidden_size, intermediate_size, num_attention_heads, num_key_value_heads or "
            "head_dim there"
        )
    if is_vocabulary:
        parts = [_with_mask(parts[0], rule, known)]
    return rule.transform.join(model, parts)


def _with_mask(stored: Tensor, rule: Rule, known: Described) -> Tensor:
    """Return the rows of the kept ids and, last, the mask token's row."""
    rows = stored[: known.model.vocab_size - 1]
    if known.has_mask:
        mask = stored[-1:]
    elif rule.theirs[0] == "model.embed_tokens.weight":
        mask = rows.mean(dim=0, keepdim=True)
    else:  # the head's row for the mask is never used: the mask is never predicted
        mask = torch.zeros_like(rows[:1])
    return torch.cat([rows, mask])


def _num_numbers(source: Path, tensors: ExportedTensors) -> int:
    """Return how many numbers the files hold, in any format."""
    headers = [read_header(source / name) for name in set(tensors.files.values())]
    return sum(math.prod(entry["shape"]) for header in headers for entry in header.values())
