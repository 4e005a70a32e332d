"""One of our checkpoints in, a Hugging Face folder out: one tensor in memory at a time, then verified.

Everything is written to a folder beside the target, and renamed to it once it is whole and verified.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from megatron_eso.checkpoint.folder import MANIFEST, CheckpointFolder, hash_file, tokenizer_path
from megatron_eso.config.schema import ModelConfig, ObjectiveConfig
from megatron_eso.errors import CheckpointError
from megatron_eso.export import describe
from megatron_eso.export.mapping import Rule, inexpressible, no_backbone, rules
from megatron_eso.export.model_card import model_card
from megatron_eso.export.safetensors_writer import SHARD_BYTES, SafetensorsWriter, Spec
from megatron_eso.export.source import DTYPES, Source, open_source
from megatron_eso.export.verify_export import rounded, verify_export
from megatron_eso.files import new_folder

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and in all."""


def export(
    path: Path,
    out: Path,
    *,
    dtype: str = "fp32",
    kind: str = "esolm",
    use_ema: bool = True,
    tokenizer: Path | None = None,
    verify: bool = True,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Write a Hugging Face folder; return the content of esolm_export.json.

    Args:
        path: checkpoint or run folder.
        out: folder to write; must not exist or must be empty.
        dtype: ``fp32`` or ``bf16``.
        kind: ``esolm`` or ``backbone`` (stock Llama or Qwen3).
        use_ema: export the averaged weights, if the run keeps them.
        tokenizer: tokenizer.json; None: the run's.
        verify: compare with an independent forward pass.
        shard_bytes: largest safetensors file, unless one tensor is larger.
        progress: see :data:`Progress`.

    Raises:
        CheckpointError: if the model cannot be read, expressed, written or verified.
    """
    require_free(out)
    source = open_source(path, use_ema=use_ema)
    require_expressible(source.model, source.objective, kind)
    tokens = describe.read_tokenizer(_tokenizer_path(source.folder, tokenizer), source.model)
    trained_with = source.folder.sidecar().get("data", {}).get("tokenizer")
    remarks = describe.tokenizer_remarks(tokens, source.model, trained_with)
    table = rules(source.model)
    specs = [spec for _, _, group in _work(source, table, DTYPES[dtype]) for spec in group]
    smaller = ", or use --dtype bf16" if dtype == "fp32" else ""
    require_room(out, sum(spec.num_bytes for spec in specs), advice=smaller)
    with scratch_beside(out) as scratch:
        _write_weights(scratch, source, table, specs, DTYPES[dtype], shard_bytes, progress)
        end = None if tokens is None else tokens.end_id
        config = describe.config_json(
            source.model, source.objective, kind=kind, dtype=dtype, end_id=end
        )
        describe.write_beside(
            scratch, config, source.objective, tokenizer=tokens, kind=kind,
            max_length=source.model.max_length,
        )  # fmt: skip
        found = _verify(scratch, source, dtype) if verify else {}
        facts = _facts(source, specs, dtype, kind, found) | {"remarks": remarks}
        (scratch / describe.FACTS).write_text(json.dumps(facts, indent=1))
        (scratch / "README.md").write_text(model_card(config, facts))
    return facts


@contextmanager
def scratch_beside(out: Path) -> Iterator[Path]:
    """Yield a folder that takes the name ``out`` at the end, or is removed if anything fails."""
    try:
        with new_folder(out) as scratch:
            yield scratch
    except OSError as error:  # also from the block: the message then names the file that failed
        raise CheckpointError(
            f"{error.filename or out} cannot be read or written: {error.strerror or error}"
        ) from None


def require_free(out: Path) -> None:
    """Raise if ``out`` is a file, or a folder that is not empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"--out {out} is not empty; choose another folder or remove it")


def require_room(out: Path, needed: int, *, advice: str = "") -> None:
    """Raise if the disk of ``out`` lacks room for ``needed`` bytes; the message ends in the advice."""
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed + (16 << 20):
        raise CheckpointError(
            f"--out {out} needs {needed / 2**30:.2f} GiB, but {free / 2**30:.2f} GiB are free on its disk; "
            f"make room or choose another disk{advice}"
        )


def require_expressible(model: ModelConfig, objective: ObjectiveConfig, kind: str) -> None:
    """Raise, with every reason, if a model has no Hugging Face form of that kind."""
    reasons = inexpressible(model, objective.name)
    if objective.name == "ar" and kind == "esolm":
        reasons.append(
            "objective.name=ar is a next-token model, not an Eso-LM: use --format backbone"
        )
    if kind == "backbone":
        reasons += no_backbone(model)
    if reasons:
        raise CheckpointError("this model cannot be exported:\n  - " + "\n  - ".join(reasons))


def _tokenizer_path(folder: CheckpointFolder, asked: Path | None) -> Path | None:
    path = tokenizer_path(folder) if asked is None else asked
    if path is not None and asked is None and not path.is_file():
        raise CheckpointError(
            f"the run's tokenizer {path} no longer exists; give it with --tokenizer FILE"
        )
    return path


def _work(
    source: Source, table: list[Rule], dtype: torch.dtype
) -> Iterator[tuple[Rule, int | None, list[Spec]]]:
    """Yield each of our tensors with those it becomes; refuse missing tensors, and any others."""
    stored = source.reader.tensors
    prefix = source.kind + "."
    wanted = {prefix + rule.ours: rule for rule in table}
    wrong = [f"{name} is missing" for name in wanted if name not in stored]
    wrong += [
        f"{n} has no place in the export"
        for n in stored
        if n.startswith(prefix) and n not in wanted
    ]
    if wrong:
        raise CheckpointError(
            f"{source.folder.path} does not hold its model:\n  - " + "\n  - ".join(wrong)
        )
    layered = [rule for rule in table if rule.is_layered]
    first = [rule for rule in table if not rule.is_layered]
    for rule in first[:1]:
        yield rule, None, _specs(source, rule, None, dtype)
    for layer in range(source.model.num_layers):
        for rule in layered:
            yield rule, layer, _specs(source, rule, layer, dtype)
    for rule in first[1:]:
        yield rule, None, _specs(source, rule, None, dtype)


def _specs(source: Source, rule: Rule, layer: int | None, dtype: torch.dtype) -> list[Spec]:
    shape = source.reader.tensors[f"{source.kind}.{rule.ours}"].shape
    if layer is not None:
        if shape[0] != source.model.num_layers:
            raise CheckpointError(
                f"{rule.ours} holds {shape[0]} layers, but the description says {source.model.num_layers}"
            )
        shape = shape[1:]
    shapes = rule.transform.shapes(source.model, shape)
    names = [name.format(layer) for name in rule.theirs]
    return [Spec(n, tuple(s), dtype) for n, s in zip(names, shapes, strict=True)]


def _write_weights(
    folder: Path, source: Source, table: list[Rule], specs: list[Spec], dtype: torch.dtype,
    shard_bytes: int, progress: Progress,
) -> None:  # fmt: skip
    total, done = sum(spec.num_bytes for spec in specs), 0
    with SafetensorsWriter(folder, specs, shard_bytes) as writer:
        for rule, layer, group in _work(source, table, dtype):
            parts = rule.transform.split(source.model, source.read(rule.ours, layer))
            for spec, part in zip(group, parts, strict=True):
                writer.write(spec.name, part)
                done += spec.num_bytes
            del parts, part
            progress(done, total)


def _verify(folder: Path, source: Source, dtype: str) -> dict[str, Any]:
    found = verify_export(folder, source.model, rounded(source.read, DTYPES[dtype]))
    failures = found.failures()
    if failures:
        raise CheckpointError(
            "the export does not compute what the checkpoint computes (this is a bug; nothing was "
            "written):\n  - " + "\n  - ".join(failures)
        )
    return asdict(found)


def _facts(
    source: Source, specs: list[Spec], dtype: str, kind: str, verification: dict[str, Any]
) -> dict[str, Any]:
    return {
        "source": str(source.folder.path.absolute()),
        "source_manifest_xxh3_128": hash_file(source.folder.path / MANIFEST),
        "step": source.folder.step,
        "weights": source.kind,
        "format": kind,
        "dtype": dtype,
        "alpha_0": source.objective.alpha_0,
        "objective": asdict(source.objective),
        "sequence_length": source.folder.sidecar()["sequence_length"],
        "num_tensors": len(specs),
        "num_parameters": sum(spec.num_bytes // spec.dtype.itemsize for spec in specs),
        "versions": {name: _version(name) for name in ("megatron-eso", "torch", "transformers")},
        "not_exported": not_exported(source),
        "verification": verification,
    }


def not_exported(source: Source) -> list[str]:
    """Return what the exported folder lacks of the checkpoint, and why."""
    model, stored = source.model, source.reader.tensors
    other = sorted({name.split(".")[0] for name in stored} - {source.kind})
    why = {"weights": "not the weights asked for", "ema": "not the weights asked for"}
    reasons = [f"{name}: {why.get(name, 'optimizer state')}" for name in other]
    extra = _padded_rows(source)
    if extra:
        reasons.append(f"{extra} padded vocabulary rows: they stand for no token")
    if model.dropout:
        reasons.append(f"model.dropout={model.dropout}: the exported class has none")
    return reasons


def _padded_rows(source: Source) -> int:
    return source.reader.tensors[f"{source.kind}.embedding.word_embeddings.weight"].shape[0] - (
        source.model.vocab_size
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
