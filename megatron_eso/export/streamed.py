"""An exported model that holds one layer's weights at a time, for verifying exports of any size.

The model's own classes run unchanged; before a module runs, hooks read its weights from the safetensors
files. Several calls go through the model in step, so that weights are read once for all of them.
"""

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
        """Return one tensor in its own dtype, mapped from the file (privately), not copied."""
        if name not in self.files:
            raise CheckpointError(f"{self.folder} holds no tensor {name}")
        try:
            with safe_open(self.folder / self.files[name], framework="pt") as file:
                return file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder / self.files[name]}: {error}") from None


class StreamedModel:
    """The exported model in float32; a part's weights are only in memory while it runs."""

    def __init__(self, folder: Path) -> None:
        """Build the model without weights.

        Raises:
            CheckpointError: naming every tensor that is missing or unknown to the model.
        """
        self.config = read_config(folder)
        self.model = _class_of(self.config)(self.config).eval()
        self._tensors = ExportedTensors(folder)
        self._tied = {"lm_head.weight"} if self.config.tie_word_embeddings else set()
        self._check_names()
        self._loaded: nn.Module | None = None
        self._together = _Together(0, self._load)
        inner = self.model.model
        units = {"model.embed_tokens": inner.embed_tokens, "model.norm": inner.norm}
        units["lm_head"] = self.model.lm_head
        units |= {f"model.layers.{i}": layer for i, layer in enumerate(inner.layers)}
        for prefix, unit in units.items():
            self._stream(prefix, unit)

    def in_step(self, calls: Sequence[Callable[[Any], Any]]) -> list[Any]:
        """Return the result of each call, given the model.

        The calls run in threads that take turns: a part runs for all of them, then the next is loaded. A
        call that passes through the model fewer times than others ends earlier.

        Raises:
            CheckpointError: if a tensor's shape is not the model's.
        """
        self._together = _Together(len(calls), self._load)
        with ThreadPoolExecutor(len(calls)) as threads:
            futures = [threads.submit(self._run, call) for call in calls]
        self._drop()
        return [future.result() for future in futures]

    def _run(self, call: Callable[[Any], Any]) -> Any:
        try:
            with torch.no_grad():  # this setting is per thread
                return call(self.model)
        finally:
            self._together.leave()

    def _check_names(self) -> None:
        wanted = {name for name, _ in self.model.named_parameters()} - self._tied
        stored = set(self._tensors.files)
        wrong = [f"{name} is missing" for name in sorted(wanted - stored)]
        wrong += [f"{name} is unknown to the model" for name in sorted(stored - wanted)]
        if wrong:
            folder = self._tensors.folder
            raise CheckpointError(f"{folder} does not hold its model:\n  - " + "\n  - ".join(wrong))

    def _stream(self, prefix: str, unit: nn.Module) -> None:
        def before(module: nn.Module, arguments: Any) -> None:
            self._together.arrive(prefix, module)

        def after(module: nn.Module, arguments: Any, output: Any) -> None:
            self._together.turn.release()

        unit.register_forward_pre_hook(before)
        unit.register_forward_hook(after, always_call=True)

    def _load(self, prefix: str, module: nn.Module) -> None:
        """Load a part's weights, and drop those of the part before."""
        self._drop()
        state = {}
        for name, parameter in module.named_parameters():
            full = f"{prefix}.{name}"
            full = "model.embed_tokens.weight" if full in self._tied else full
            tensor = self._tensors.read(full)
            if tensor.shape != parameter.shape:
                raise CheckpointError(
                    f"{full} has shape {tuple(tensor.shape)}, the model wants {tuple(parameter.shape)}"
                )
            state[name] = tensor.float()
        module.load_state_dict(state, assign=True)
        self._loaded = module

    def _drop(self) -> None:
        if self._loaded is not None:
            self._loaded.to("meta")
            self._loaded = None


class _Together:
    """Threads that go through the same parts; each part is loaded once all threads have reached it."""

    def __init__(self, number: int, load: Callable[[str, nn.Module], None]) -> None:
        self._number, self._load = number, load
        self._waiting: list[tuple[str, nn.Module]] = []
        self._round = 0
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self.turn = threading.Lock()
        """Held while a part runs, so that only one call at a time uses memory and threads."""

    def arrive(self, prefix: str, module: nn.Module) -> None:
        """Wait until the part is loaded and it is this thread's turn."""
        with self._changed:
            self._waiting.append((prefix, module))
            now = self._round
            self._go_on()
            self._changed.wait_for(lambda: self._round > now)
        self.turn.acquire()  # released by a hook that runs even if the part fails
        if self._error is not None:
            raise self._error

    def leave(self) -> None:
        """Let the others continue without this thread."""
        with self._changed:
            self._number -= 1
            self._go_on()

    def _go_on(self) -> None:
        if not self._waiting or len(self._waiting) < self._number:
            return
        try:
            (part,) = set(self._waiting)
            self._load(*part)
        except Exception as error:  # raised in every thread, so that none waits forever
            self._error = error
        self._waiting, self._round = [], self._round + 1
        self._changed.notify_all()


def read_config(folder: Path) -> Any:
    """Return an exported folder's configuration as an object of our own classes."""
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
            f"{folder} holds a {content.get('model_type')!r}, which is not an export of this program"
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
        # No weights: parameters on the meta device have only shapes.
        with torch.device("meta"):
            return kind(settings)

    return build
