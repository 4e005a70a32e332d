"""What ``eval`` and ``sample`` share: reading a checkpoint or exported folder, its model and tokenizer."""

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
    """Tokenizer of the package ``tokenizers``; None unless requested."""


@dataclass(frozen=True)
class Described:
    """What is known about a model before its weights are read."""

    path: Path
    model: Any
    """ModelConfig."""
    objective: Any
    """ObjectiveConfig."""
    sequence_length: int
    tokenizer_file: Path | None


def describe(path: Path) -> Described:
    """Return what a checkpoint, a run or an exported folder says about its model.

    Raises:
        CheckpointError: if ``path`` cannot be read.
    """
    if is_exported(path):
        from megatron_eso.export.import_hf import describe_hf

        known = describe_hf(path)
        file = None if known.tokenizer is None else known.tokenizer.path
        return Described(path, known.model, known.objective, known.sequence_length, file)
    from megatron_eso.checkpoint.find import find_checkpoint
    from megatron_eso.checkpoint.folder import tokenizer_path
    from megatron_eso.checkpoint.replica import run_config_of
    from megatron_eso.config.schema import ParallelConfig

    folder = find_checkpoint(path)
    config = run_config_of(folder, ParallelConfig())
    length = config.train.sequence_length
    return Described(folder.path, config.model, config.objective, length, tokenizer_path(folder))


def tokenizer_of(known: Described) -> Any:
    """Return the tokenizer (of the package ``tokenizers``); refuse one that does not fit the model.

    Raises:
        CheckpointError: if there is no tokenizer, or the numbers of ids differ.
    """
    from megatron_eso.data.tokenizer import load_tokenizer
    from megatron_eso.errors import CheckpointError

    if known.tokenizer_file is None:
        raise CheckpointError(
            f"{known.path} has no tokenizer; import or export it again with --tokenizer tokenizer.json"
        )
    require_tokenizer_of_model(known.tokenizer_file, known.path, known.model)
    return load_tokenizer(known.tokenizer_file)


def require_tokenizer_of_model(file: Path, path: Path, model: Any) -> None:
    """Refuse a tokenizer whose number of ids is not that of the model at ``path``.

    Raises:
        CheckpointError: if the numbers differ; the message names them.
    """
    from megatron_eso.data.tokenizer import Tokenizer
    from megatron_eso.errors import CheckpointError

    found = Tokenizer(file, requires_end=False)
    if found.vocab_size != model.vocab_size:
        raise CheckpointError(
            f"tokenizer {file} has {found.vocab_size - 1} ids, but the model of {path} has "
            f"{model.vocab_size - 1} besides the mask token: text would be encoded or decoded "
            "wrongly. Use the tokenizer the model was trained with; import a Hugging Face model whose "
            "embedding has spare rows with --cut-vocabulary"
        )


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
    """Return the model at ``path``: the folder of a checkpoint or a run, or a Hugging Face folder.

    Raises:
        CheckpointError: if it cannot be read, or a tokenizer is requested and there is none that fits.
    """
    from megatron_eso.checkpoint.find import find_checkpoint_together
    from megatron_eso.config.schema import ParallelConfig

    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, context=context, sequence=False)
    if is_exported(path):
        from megatron_eso.export.describe import read_facts

        with _imported(path) as folder:
            loaded = _load(folder, parallel, dtype=dtype, use_ema=use_ema)
        kept = loaded.tokenizer_file  # this path is in the temporary copy, which has vanished
        loaded = replace(
            loaded, path=path, step=read_facts(path).get("step", 0), kind="exported",
            tokenizer_file=None if kept is None else path / kept.name,
        )  # fmt: skip
    else:
        # A live run may commit a checkpoint while the ranks look, so all take the first rank's choice.
        device = _join()[1].torch_device
        folder = find_checkpoint_together(path, hashes=False, device=device)
        loaded = _load(folder, parallel, dtype=dtype, use_ema=use_ema)
    if not with_tokenizer:
        return loaded
    config = loaded.replica.config
    known = Described(
        loaded.path, config.model, config.objective, config.train.sequence_length,
        loaded.tokenizer_file,
    )  # fmt: skip
    return replace(loaded, tokenizer=tokenizer_of(known))


def is_exported(path: Path) -> bool:
    """Return whether a folder is that of a Hugging Face model."""
    return (path / "config.json").is_file()


@contextmanager
def _imported(path: Path) -> Iterator[Any]:
    """Yield a temporary checkpoint made from an exported folder by the first rank of each machine.

    It vanishes once every rank has left the block. Every rank must call this.
    """
    import socket
    import tempfile
    from contextlib import ExitStack

    import torch.distributed as dist

    from megatron_eso.checkpoint.folder import CheckpointFolder
    from megatron_eso.errors import CheckpointError
    from megatron_eso.export.import_hf import import_hf

    ranks, _ = _join()
    with ExitStack() as held:
        mine: tuple[str, Path | None, str] = (socket.gethostname(), None, "")
        if ranks.local_rank == 0:
            scratch = held.enter_context(tempfile.TemporaryDirectory(prefix="megatron-eso-"))
            try:
                made = import_hf(path, Path(scratch) / "checkpoint").folder.path
                mine = (mine[0], made, "")
            except CheckpointError as error:
                mine = (mine[0], None, str(error))
        found: list[Any] = [None] * ranks.world_size
        dist.all_gather_object(found, mine)
        errors = [error for _, _, error in found if error]
        if errors:
            raise CheckpointError(errors[0])
        yield CheckpointFolder(next(made for host, made, _ in found if made and host == mine[0]))
        dist.barrier()


def _join() -> tuple[Any, Any]:
    """Join the process group; return this process's place among the ranks and its device."""
    from megatron_eso.launch.environment import Ranks
    from megatron_eso.parallel.device import choose_device, start_process_group

    ranks = Ranks.from_environment(os.environ)
    device = choose_device(ranks.local_rank)
    start_process_group(ranks, device)
    return ranks, device


def _load(folder: Any, parallel: Any, *, dtype: str, use_ema: bool) -> Loaded:
    """Return a checkpoint's model without its tokenizer."""
    from megatron_eso.checkpoint.folder import tokenizer_path
    from megatron_eso.checkpoint.replica import load_replica, run_config_of
    from megatron_eso.config.check import check_layout
    from megatron_eso.errors import CheckpointError
    from megatron_eso.model.build import resolve_precision
    from megatron_eso.parallel.exchange import together
    from megatron_eso.parallel.groups import build_groups

    ranks, device = _join()
    config = together(lambda: run_config_of(folder, parallel), device.torch_device, CheckpointError)
    check_layout(config, ranks.world_size)
    config = replace(config, precision=replace(config.precision, dtype=dtype))
    config = resolve_precision(config, dtype)
    layout = build_groups(config.parallel, seed=0)
    replica, kind = load_replica(folder, config, layout, device, use_ema=use_ema)
    return Loaded(folder.path, folder.step, replica, kind, tokenizer_path(folder), None)
