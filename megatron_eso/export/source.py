"""A checkpoint opened for reading: its description (esolm.json) and its tensors."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_eso.checkpoint.folder import CheckpointFolder, list_folders
from megatron_eso.checkpoint.torch_dist import TorchDistReader
from megatron_eso.config.schema import ModelConfig, ObjectiveConfig
from megatron_eso.errors import CheckpointError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Source:
    """A checkpoint that can be read tensor by tensor."""

    folder: CheckpointFolder
    reader: TorchDistReader
    model: ModelConfig
    objective: ObjectiveConfig
    kind: str
    """``weights`` or ``ema``."""

    def read(self, name: str, layer: int | None) -> Tensor:
        """Return one tensor by our name."""
        return self.reader.read(f"{self.kind}.{name}", layer)


def find_folder(path: Path) -> CheckpointFolder:
    """Return the checkpoint that a path means: itself, or the newest whole one of a run.

    Raises:
        CheckpointError: if there is none, or the named one is damaged.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file; give a checkpoint folder or a run folder")
    for root in (path, path / "checkpoints"):
        whole = [folder for folder in list_folders(root) if not folder.damage(hashes=False)]
        if whole:
            return whole[-1]
        if list_folders(root):
            raise CheckpointError(f"no checkpoint under {root} is whole")
    folder = CheckpointFolder(path)
    folder.sidecar()
    damage = folder.damage(hashes=False)
    if damage:
        raise CheckpointError(f"checkpoint {path} cannot be used: {damage}")
    return folder


def open_source(path: Path, *, use_ema: bool) -> Source:
    """Open and return a checkpoint.

    Raises:
        CheckpointError: if it is not whole, or its description has another version.
    """
    folder = find_folder(path)
    sidecar = folder.sidecar()
    kind = "ema" if use_ema and sidecar.get("has_ema") else "weights"
    return Source(
        folder=folder,
        reader=TorchDistReader(folder.path),
        model=_section(ModelConfig, sidecar, "model", folder.path),
        objective=_section(ObjectiveConfig, sidecar, "objective", folder.path),
        kind=kind,
    )


def _section(schema: Any, sidecar: dict[str, Any], name: str, path: Path) -> Any:
    values = sidecar.get(name)
    known = {field.name for field in fields(schema)}
    if not isinstance(values, dict) or not set(values) <= known:
        raise CheckpointError(
            f"{path}: the {name} section of its description is missing or of another version"
        )
    return schema(**values)
