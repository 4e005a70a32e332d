"""What ``eval`` and ``sample`` share: one process, one checkpoint, its model and tokenizer."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Loaded:
    """A checkpoint ready to use."""

    folder: Any
    replica: Any
    kind: str
    tokenizer: Any


def load(
    path: Path,
    *,
    use_ema: bool,
    dtype: str,
    tensor: int = 1,
    pipeline: int = 1,
    with_tokenizer: bool = True,
) -> Loaded:
    """Load the checkpoint meant by ``path`` (its folder or a run's).

    Raises:
        CheckpointError: if a tokenizer is wanted and the checkpoint has none.
    """
    from megatron_eso.checkpoint.load import find_checkpoint
    from megatron_eso.checkpoint.replica import load_replica, run_config_of, tokenizer_path
    from megatron_eso.config.schema import ParallelConfig
    from megatron_eso.data.tokenizer import load_tokenizer
    from megatron_eso.errors import CheckpointError
    from megatron_eso.model.build import resolve_precision
    from megatron_eso.parallel.device import Ranks, choose_device, start_process_group
    from megatron_eso.parallel.groups import build_groups

    folder = find_checkpoint(path)
    config = run_config_of(folder, ParallelConfig(tensor=tensor, pipeline=pipeline, sequence=False))
    ranks = Ranks.from_environment(dict(os.environ))
    device = choose_device(ranks.local_rank)
    start_process_group(ranks, device)
    config = replace(config, precision=replace(config.precision, dtype=dtype))
    config = resolve_precision(config, dtype)
    layout = build_groups(config.parallel, seed=0)
    replica, kind = load_replica(folder, config, layout, device, use_ema=use_ema)
    tokenizer = None
    if with_tokenizer:
        file = tokenizer_path(folder)
        if file is None:
            raise CheckpointError(
                f"{folder.path} has no tokenizer; import it again with --tokenizer tokenizer.json"
            )
        tokenizer = load_tokenizer(file)
    return Loaded(folder, replica, kind, tokenizer)
