"""An exported model that holds one layer's weights at a time, for verifying exports of any size.

The model's own classes run unchanged; hooks read a module's weights from the safetensors files before it
runs and drop them after.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from megatron_eso.errors import CheckpointError


class ExportedTensors:
    """The tensors of an exported folder by name; a file is open only while one is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        try:
            if index.is_file():
                self.files = dict(json.loads(index.read_text())["weight_map"])
            else:
                with safe_open(folder / "model.safetensors", framework="pt") as file:
                    self.files = dict.fromkeys(file.keys(), "model.safetensors")
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder} holds no readable safetensors weights: {error}"
            ) from None

    def read(self, name: str) -> torch.Tensor:
        """Return a private copy of one tensor, in its own dtype."""
        if name not in self.files:
            raise CheckpointError(f"{self.folder} holds no tensor {name}")
        try:
            with safe_open(self.folder / self.files[name], framework="pt") as file:
                return file.get_tensor(name).clone()
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder / self.files[name]}: {error}") from None


def streamed_model(folder: Path) -> Any:
    """Return the exported model in float32, weights read layer by layer as it runs.

    Raises:
        CheckpointError: if names or shapes are not the model's, each named.
    """
    config = read_config(folder)
    model = _class_of(config)(config)
    tensors = ExportedTensors(folder)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    wanted = {name for name, _ in model.named_parameters()} - tied
    wrong = [f"{name} is missing" for name in sorted(wanted - set(tensors.files))]
    wrong += [f"{name} is unknown to the model" for name in sorted(set(tensors.files) - wanted)]
    if wrong:
        raise CheckpointError(f"{folder} does not hold its model:\n  - " + "\n  - ".join(wrong))
    units = {"model.embed_tokens": model.model.embed_tokens, "model.norm": model.model.norm}
    units["lm_head"] = model.lm_head
    units |= {f"model.layers.{i}": layer for i, layer in enumerate(model.model.layers)}
    for prefix, unit in units.items():
        _stream(unit, prefix, tensors, tied)
    return model.eval()


def read_config(folder: Path) -> Any:
    """Return the configuration object of an exported folder, by our own classes."""
    from megatron_eso.export.hf.configuration_esolm import EsoLMConfig, EsoLMDiTConfig

    try:
        content = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}/config.json cannot be read: {error}") from None
    kinds = {"esolm": EsoLMConfig, "esolm_dit": EsoLMDiTConfig}
    if content.get("model_type") in ("llama", "qwen3"):  # the backbone format
        content |= {"qk_norm": content["model_type"] == "qwen3", "model_type": "esolm"}
    kind = kinds.get(content.get("model_type"))
    if kind is None:
        raise CheckpointError(
            f"{folder} holds a {content.get('model_type')!r}, which is no export of ours"
        )
    unread = (
        "auto_map",
        "architectures",
        "dtype",
        "torch_dtype",
        "layer_types",
        "transformers_version",
    )
    return kind(**{k: v for k, v in content.items() if k not in unread})


def _class_of(config: Any) -> Any:
    from megatron_eso.export.hf.modeling_esolm import EsoLMDiTForCausalLM, EsoLMForCausalLM

    kind = EsoLMDiTForCausalLM if config.model_type == "esolm_dit" else EsoLMForCausalLM

    def build(settings: Any) -> Any:
        settings._attn_implementation = "eager"
        # No weights: parameters on the meta device have shapes alone.
        with torch.device("meta"):
            return kind(settings)

    return build


def _stream(unit: nn.Module, prefix: str, tensors: ExportedTensors, tied: set[str]) -> None:
    names = [name for name, _ in unit.named_parameters()]
    shapes = {name: tuple(p.shape) for name, p in unit.named_parameters()}

    def load(module: nn.Module, arguments: Any) -> None:
        state = {}
        for name in names:
            full = f"{prefix}.{name}"
            full = "model.embed_tokens.weight" if full in tied else full
            tensor = tensors.read(full)
            if tuple(tensor.shape) != shapes[name]:
                raise CheckpointError(
                    f"{full} has shape {tuple(tensor.shape)}, the model wants {shapes[name]}"
                )
            state[name] = tensor.float()
        module.load_state_dict(state, assign=True)

    def drop(module: nn.Module, arguments: Any, output: Any) -> None:
        module.to("meta")

    unit.register_forward_pre_hook(load)
    unit.register_forward_hook(drop)
