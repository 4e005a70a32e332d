"""``megatron-eso checkpoint``: which checkpoints are kept, whether they are whole, which to remove.

``list``, ``verify`` and ``prune`` work on a login node without torch.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_eso.cli.application import application

if TYPE_CHECKING:
    from megatron_eso.checkpoint.folder import CheckpointFolder

app = application(
    no_args_is_help=True,
    help="List, inspect, verify, prune and compare checkpoints.",
)
_Run = Annotated[Path, typer.Argument(help="Run folder, or its checkpoints folder")]
_Which = Annotated[Path, typer.Argument(help="Checkpoint folder, or a run folder (its newest one)")]


@app.command("list")
def list_(run: _Run) -> None:
    """List the checkpoints of a run: step, size, age, layout, damage.

    Checks the sizes of files, not their hashes (`verify` does).

    Examples:
        megatron-eso checkpoint list runs/quickstart
    """
    for folder in _folders(run):
        damage = folder.damage(hashes=False)
        sidecar = {} if damage else folder.sidecar()
        size = sum(p.stat().st_size for p in folder.path.iterdir() if p.is_file())
        layout = sidecar.get("parallel", {})
        ranks = sidecar.get("num_ranks", "?")
        where = f"{ranks} ranks, tensor {layout.get('tensor')}, pipeline {layout.get('pipeline')}"
        age = _age(time.time() - folder.path.stat().st_mtime)
        state = f"DAMAGED: {damage}" if damage else where
        typer.echo(f"step {folder.step:>10}  {size / 2**20:>10,.1f} MiB  {age:>9} ago  {state}")


@app.command()
def inspect(
    checkpoint: _Which,
    tensors: Annotated[bool, typer.Option(help="Also list every tensor and its shape")] = False,
) -> None:
    """Show what a checkpoint holds and where it came from.

    Examples:
        megatron-eso checkpoint inspect runs/quickstart
        megatron-eso checkpoint inspect runs/quickstart/checkpoints/step_0000000500 --tensors
    """
    folder = _one(checkpoint)
    sidecar = folder.sidecar()
    typer.echo(f"{folder.path}")
    for name in ("step", "format_version", "has_ema", "sequence_length", "tokenizer", "num_ranks"):
        typer.echo(f"{name:<18}{sidecar.get(name)}")
    for name in ("model", "objective", "parallel", "train_state", "data"):
        values = sidecar.get(name) or {}
        values = {k: v if k != "losses" else f"{len(v)} numbers" for k, v in values.items()}
        typer.echo(f"{name:<18}" + ", ".join(f"{k}={v}" for k, v in values.items()))
    if tensors:
        from megatron_eso.checkpoint.compare import tensors_of

        for name, stored in tensors_of(folder).items():
            typer.echo(f"  {name:<60} {list(stored.shape)} {stored.dtype}")


@app.command()
def verify(
    checkpoint: _Which,
    every: Annotated[bool, typer.Option(help="Verify all checkpoints of the run")] = False,
    hashes: Annotated[bool, typer.Option(help="Read every file and compare hashes")] = True,
) -> None:
    """Compare a checkpoint's files with its manifest.

    Exit code 0: whole; 4: damaged.

    Examples:
        megatron-eso checkpoint verify runs/quickstart --every
    """
    folders = _folders(checkpoint) if every else [_one(checkpoint)]
    damaged = 0
    for folder in folders:
        damage = folder.damage(hashes=hashes)
        damaged += bool(damage)
        typer.echo(f"{folder.path}: {'DAMAGED: ' + damage if damage else 'whole'}")
    if damaged:
        raise typer.Exit(4)


@app.command()
def prune(
    run: _Run,
    keep_last: Annotated[int, typer.Option(min=1, help="Newest checkpoints to keep")] = 2,
    keep_every: Annotated[
        int | None, typer.Option(min=1, help="Also keep checkpoints at multiples of this step")
    ] = None,
    hashes: Annotated[
        bool, typer.Option(help="Read the checkpoints to keep and compare hashes")
    ] = True,
    dry_run: Annotated[bool, typer.Option(help="Only say what would be removed")] = False,
) -> None:
    """Remove old checkpoints, and unfinished ones older than the newest.

    Only whole checkpoints count as kept, so a damaged one never takes the place of a whole one.

    Examples:
        megatron-eso checkpoint prune runs/quickstart --keep-last 1 --dry-run
        megatron-eso checkpoint prune runs/quickstart --keep-last 3 --keep-every 10000
    """
    from megatron_eso.checkpoint import folder as files

    root = _folders(run)[0].path.parent
    unwanted = files.unwanted(root, keep_last=keep_last, keep_every_steps=keep_every, hashes=hashes)
    for folder in unwanted:
        if not dry_run:
            _remove(folder)
        typer.echo(f"{'would remove' if dry_run else 'removed'} {folder.path}")
    if not unwanted:
        typer.echo("nothing to remove")


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="Checkpoint folder or run folder")],
    second: Annotated[Path, typer.Argument(help="Checkpoint folder or run folder")],
) -> None:
    """Show the largest difference in each group of tensors.

    The checkpoints may have different layouts. Exit code 0: bitwise equal; 1: different; 4: not
    comparable.

    Examples:
        megatron-eso checkpoint compare runs/first runs/second
    """
    from megatron_eso.checkpoint.compare import compare as differences

    found = differences(_one(first), _one(second))
    for d in found:
        result = "bitwise equal" if d.is_bitwise_equal else f"{d.largest:.3e} in {d.where}"
        typer.echo(f"{d.group:<12} {d.num_tensors:>5} tensors  {result}")
    if not all(d.is_bitwise_equal for d in found):
        raise typer.Exit(1)


def _remove(folder: "CheckpointFolder") -> None:
    from megatron_eso.checkpoint.folder import remove
    from megatron_eso.errors import CheckpointError

    reason = "some of its files stay; look at their permissions"
    try:
        remove(folder)
    except OSError as error:
        reason = error.strerror
    if folder.path.exists():
        raise CheckpointError(f"{folder.path} cannot be removed: {reason}")


def _folders(run: Path) -> "list[CheckpointFolder]":
    from megatron_eso.checkpoint.folder import list_folders
    from megatron_eso.errors import CheckpointError

    for root in (run / "checkpoints", run):
        folders = list_folders(root)
        if folders:
            return folders
    what = "holds no checkpoints" if run.exists() else "does not exist"
    raise CheckpointError(f"{run} {what}; give a run folder, such as runs/NAME")


def _one(path: Path) -> "CheckpointFolder":
    """Return the checkpoint folder given, or the newest committed one of a run."""
    from megatron_eso.checkpoint.folder import MARKER, SIDECAR, CheckpointFolder
    from megatron_eso.errors import CheckpointError

    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file; give a checkpoint folder or a run folder")
    if path.name.startswith("step_") or (path / SIDECAR).exists():
        return CheckpointFolder(path)
    committed = [folder for folder in _folders(path) if folder.is_committed]
    if not committed:
        raise CheckpointError(
            f"none of the {len(_folders(path))} checkpoints of {path} is complete (holds a file {MARKER})"
        )
    return committed[-1]


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if abs(seconds) >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
