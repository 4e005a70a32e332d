"""What ``eval`` and ``sample`` share: one checkpoint or exported folder, its model and tokenizer."""

import os
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
    context: int = 1,
    with_tokenizer: bool = True,
) -> Loaded:
    """Load the checkpoint meant by ``path``: its folder, a run's, or a Hugging Face folder.

    Raises:
        CheckpointError: if it cannot be read, or a tokenizer is wanted and there is none.
    """
    import tempfile

    from megatron_eso.checkpoint.load import find_checkpoint
    from megatron_eso.config.schema import ParallelConfig
    from megatron_eso.data.tokenizer import load_tokenizer
    from megatron_eso.errors import CheckpointError

    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, context=context, sequence=False)
    if is_exported(path):
        from megatron_eso.export.describe import read_facts
        from megatron_eso.export.import_hf import import_hf

        with tempfile.TemporaryDirectory(prefix="megatron-eso-") as scratch:
            folder = import_hf(path, Path(scratch) / "checkpoint").folder
            loaded = _load(folder, parallel, dtype=dtype, use_ema=use_ema)
        kept = loaded.tokenizer_file  # its copy has vanished
        loaded = replace(
            loaded, path=path, step=read_facts(path).get("step", 0), kind="exported",
            tokenizer_file=None if kept is None else path / kept.name,
        )  # fmt: skip
    else:
        loaded = _load(find_checkpoint(path), parallel, dtype=dtype, use_ema=use_ema)
    if not with_tokenizer:
        return loaded
    if loaded.tokenizer_file is None:
        raise CheckpointError(
            f"{loaded.path} has no tokenizer; import it again with --tokenizer tokenizer.json"
        )
    return replace(loaded, tokenizer=load_tokenizer(loaded.tokenizer_file))


def is_exported(path: Path) -> bool:
    """Return whether a folder is a Hugging Face model's."""
    return (path / "config.json").is_file()


def _load(folder: Any, parallel: Any, *, dtype: str, use_ema: bool) -> Loaded:
    """Load a checkpoint's model, without its tokenizer."""
    from megatron_eso.checkpoint.replica import load_replica, run_config_of, tokenizer_path
    from megatron_eso.model.build import resolve_precision
    from megatron_eso.parallel.device import Ranks, choose_device, start_process_group
    from megatron_eso.parallel.groups import build_groups

    config = run_config_of(folder, parallel)
    ranks = Ranks.from_environment(dict(os.environ))
    device = choose_device(ranks.local_rank)
    start_process_group(ranks, device)
    config = replace(config, precision=replace(config.precision, dtype=dtype))
    config = resolve_precision(config, dtype)
    layout = build_groups(config.parallel, seed=0)
    replica, kind = load_replica(folder, config, layout, device, use_ema=use_ema)
    return Loaded(folder.path, folder.step, replica, kind, tokenizer_path(folder), None)
