"""What ``eval`` and ``sample`` share: one checkpoint or exported folder, its model and tokenizer."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Loaded:
    """A model ready to use."""

    path: Path
    """The checkpoint's folder, or the exported folder."""
    step: int
    replica: Any
    kind: str
    """ema, raw, or exported."""
    tokenizer_file: Path | None
    tokenizer: Any
    """Of ``tokenizers``; None unless asked for."""


def load(
    path: Path,
    *,
    use_ema: bool,
    dtype: str,
    tensor: int = 1,
    pipeline: int = 1,
    with_tokenizer: bool = True,
) -> Loaded:
    """Load the checkpoint meant by ``path``: its folder, a run's, or a Hugging Face folder.

    Raises:
        CheckpointError: if it cannot be read, or a tokenizer is wanted and there is none.
    """
    from megatron_eso.checkpoint.replica import load_replica, run_config_of, tokenizer_path
    from megatron_eso.config.schema import ParallelConfig
    from megatron_eso.data.tokenizer import load_tokenizer
    from megatron_eso.errors import CheckpointError
    from megatron_eso.model.build import resolve_precision
    from megatron_eso.parallel.device import Ranks, choose_device, start_process_group
    from megatron_eso.parallel.groups import build_groups

    with _checkpoint_of(path) as folder:
        parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, sequence=False)
        config = run_config_of(folder, parallel)
        ranks = Ranks.from_environment(dict(os.environ))
        device = choose_device(ranks.local_rank)
        start_process_group(ranks, device)
        config = replace(config, precision=replace(config.precision, dtype=dtype))
        config = resolve_precision(config, dtype)
        layout = build_groups(config.parallel, seed=0)
        replica, kind = load_replica(folder, config, layout, device, use_ema=use_ema)
        file, place, step = tokenizer_path(folder), folder.path, folder.step
    if _is_exported(path):
        place, kind = path, "exported"
        step = _exported_step(path)
        file = None if file is None else path / file.name
    if with_tokenizer and file is None:
        raise CheckpointError(
            f"{place} has no tokenizer; import it again with --tokenizer tokenizer.json"
        )
    tokenizer = load_tokenizer(file) if with_tokenizer and file is not None else None
    return Loaded(place, step, replica, kind, file, tokenizer)


def _is_exported(path: Path) -> bool:
    return (path / "config.json").is_file()


def _exported_step(path: Path) -> int:
    """Return the step that the export noted; 0 for another program's model."""
    import json

    file = path / "esolm_export.json"
    return json.loads(file.read_text())["step"] if file.is_file() else 0


@contextmanager
def _checkpoint_of(path: Path) -> Iterator[Any]:
    """Give the checkpoint; an exported folder is imported into one that vanishes afterwards."""
    import tempfile

    from megatron_eso.checkpoint.load import find_checkpoint
    from megatron_eso.export.import_hf import import_hf

    if not _is_exported(path):
        yield find_checkpoint(path)
        return
    with tempfile.TemporaryDirectory(prefix="megatron-eso-") as scratch:
        yield import_hf(path, Path(scratch) / "checkpoint").folder
