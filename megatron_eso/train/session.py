"""Everything a training process holds, and how it is put together.

``TrainState`` is all that a restart needs besides the tensors: all randomness and the position in the
data follow from the step.
"""

import os
import platform
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from megatron_eso.config import derive
from megatron_eso.config.check import check
from megatron_eso.config.precision_table import require_machine
from megatron_eso.config.schema import RunConfig
from megatron_eso.errors import ConfigError
from megatron_eso.launch.environment import Ranks
from megatron_eso.model.attention.kernels import choose_kernel, facts_of
from megatron_eso.model.build import build_chunks, resolve_precision
from megatron_eso.model.initial_weights import initialize
from megatron_eso.model.layer_graphs import can_capture, gradients_for_graphs
from megatron_eso.model.megatron_config import DTYPES
from megatron_eso.model.replica import Replica
from megatron_eso.parallel.device import (
    Device,
    be_deterministic,
    choose_device,
    idle_gpus,
    prepare_for_graphs,
    start_process_group,
)
from megatron_eso.parallel.exchange import any_rank, gather_messages
from megatron_eso.parallel.finish import before_finish
from megatron_eso.parallel.fp8_state import forget_layers
from megatron_eso.parallel.groups import Layout, build_groups
from megatron_eso.parallel.matmul_speed import faster_cpu_dtype
from megatron_eso.parallel.moving_average import MovingAverage
from megatron_eso.parallel.optimizer import PassClock, build_optimizer, wrap_for_training
from megatron_eso.parallel.te_adapter import describe_machine, require_fused_attention
from megatron_eso.parallel.user_buffers import start_user_buffers


@dataclass
class TrainState:
    """What changes from step to step, besides the tensors."""

    step: int = 0
    """Steps done; the next step has this number."""
    left_out: list[int] = field(default_factory=list)
    """Steps whose batch is not trained on, because the step guard found it bad."""
    losses: list[float] = field(default_factory=list)
    """The newest losses; the step guard compares the next one with them."""

    @property
    def num_updates(self) -> int:
        """Number of times the optimizer has changed the weights."""
        return self.step - sum(step < self.step for step in self.left_out)

    def replace_by(self, other: "TrainState") -> None:
        """Take over everything from another state."""
        self.step, self.left_out, self.losses = other.step, other.left_out, other.losses


@dataclass
class Session:
    """One rank's view of a run."""

    config: RunConfig
    derived: derive.Derived
    ranks: Ranks
    device: Device
    layout: Layout
    chunks: list[nn.Module]
    """Model chunks of this rank, wrapped with gradient buffers if there is an optimizer."""
    optimizer: Any
    average: MovingAverage | None
    state: TrainState
    clock: PassClock
    joined: float
    """Wall-clock time at which the first exchange between all ranks was done."""
    num_ranks_here: int
    """Ranks on this node."""

    @property
    def replica(self) -> Replica:
        """The model for evaluation."""
        return Replica(self.config, self.layout, self.torch_device, self.chunks)

    def draw_weights(self, draw_on: torch.device | str = "cpu") -> None:
        """Set the model, the masters and the average to the run's initial weights.

        Args:
            draw_on: a GPU is faster, but draws other numbers than those that a run begins with.
        """
        seed, optimizer = self.config.train.seed, self.optimizer
        initialize(self.chunks, self.config.model, seed=seed, optimizer=optimizer, draw_on=draw_on)
        if self.average is not None:
            self.average.restart()

    @property
    def torch_device(self) -> torch.device:
        """Device of this rank's tensors."""
        return self.device.torch_device


def start_ranks(config: RunConfig, ranks: Ranks) -> tuple[RunConfig, Device, Layout]:
    """Check the configuration and join the groups; return it with ``auto`` settings resolved."""
    check(config, ranks.world_size)
    device = choose_device(ranks.local_rank)
    if config.precision.deterministic and device.is_cuda:
        be_deterministic(os.environ)
    if _is_graphed(config, device):
        prepare_for_graphs(os.environ)
    machine = describe_machine()
    require_machine(config, machine)
    require_fused_attention(config)
    waiting = derive.waiting_seconds(config)
    start_process_group(ranks, device, timeout_seconds=waiting)
    config = resolve_precision(config, _dtype(config, device), machine)
    if config.precision.attention == "flex" and not device.is_cuda:
        raise ConfigError(
            "precision.attention=flex: PyTorch's FlexAttention has no backward pass on a CPU; use split "
            "(or auto), or dense"
        )
    attention_kernel(config, device)
    layout = build_groups(config.parallel, seed=config.train.seed, timeout_seconds=waiting)
    return config, device, layout


def build_session(
    config: RunConfig, ranks: Ranks, *, for_training: bool = True, draw_weights: bool = True
) -> Session:
    """Return a session.

    Args:
        config: the run.
        ranks: this process's place.
        for_training: also build gradient buffers, optimizer and moving average.
        draw_weights: draw initial weights; else they are undefined until loaded or drawn.
    """
    config, device, layout = start_ranks(config, ranks)
    any_rank([False], device.torch_device)
    joined = time.time()
    nodes = gather_messages(platform.node())
    chunks: list[Any]
    start_user_buffers(config)
    if config.precision.fp8 != "off":
        before_finish(forget_layers)
    chunks, settings = build_chunks(config, layout, device.torch_device)
    optimizer = average = None
    clock = PassClock(is_cuda=device.is_cuda)
    if for_training:
        is_graphed = _is_graphed(config, device)
        with gradients_for_graphs() if is_graphed else nullcontext():
            chunks = wrap_for_training(
                chunks, settings, config.parallel, clock, on_gpu=device.is_cuda
            )
        if is_graphed:
            for chunk in chunks:
                chunk.module.use_cuda_graphs()
        optimizer = build_optimizer(chunks, config.optimizer, settings)
        if config.optimizer.ema_decay > 0:
            average = MovingAverage(optimizer, config.optimizer.ema_decay)
    session = Session(
        config=config,
        derived=derive.derive(config, ranks.world_size),
        ranks=ranks,
        device=device,
        layout=layout,
        chunks=chunks,
        optimizer=optimizer,
        average=average,
        state=TrainState(),
        clock=clock,
        joined=joined,
        num_ranks_here=nodes.count(platform.node()),
    )
    if draw_weights:
        session.draw_weights()
    return session


def choices(session: Session) -> list[str]:
    """Return lines that say how settings resolved on this machine: formats, layers, kernels, graphs."""
    config, device = session.config, session.device
    precision, parallel = config.precision, config.parallel
    lines = [
        f"precision.dtype = {precision.dtype}, attention {attention_kernel(config, device)}, device "
        f"{session.torch_device}",
        *idle_gpus(device, session.num_ranks_here),
    ]
    if precision.backend == "te":
        version = ".".join(map(str, describe_machine().te or ()))
        buffers = ", user buffers" if parallel.tensor_overlap else ""
        tf32 = ", products in TF32" if precision.dtype == "fp32" else ""
        lines.append(f"layers of Transformer Engine {version}, fp8 {precision.fp8}{buffers}{tf32}")
    elif parallel.tensor_overlap:
        lines.append(
            "parallel.tensor_overlap=true has no effect: plain layers have no user buffers"
        )
    if parallel.cuda_graphs:
        lines.append(
            "layers run from CUDA graphs, captured in the first step"
            if _is_graphed(config, device)
            else "parallel.cuda_graphs=true has no effect: there is no GPU"
        )
    return lines


def _is_graphed(config: RunConfig, device: Device) -> bool:
    return config.parallel.cuda_graphs and can_capture(device.torch_device)


def attention_kernel(config: RunConfig, device: Device) -> str:
    """Return a description of the kernel that attention will run.

    Raises:
        ConfigError: if the device has no kernel for this head size and number format.
    """
    precision = config.precision
    if precision.attention not in ("split", "te"):
        return precision.attention
    dtype, size = DTYPES[precision.dtype], derive.head_size(config.model)
    rows = "split" if precision.attention == "split" else "Transformer Engine, copies by split"
    return f"{rows}, {choose_kernel(facts_of(device.torch_device), dtype, size).name} kernel"


def _dtype(config: RunConfig, device: Device) -> str:
    if config.precision.dtype != "auto":
        return config.precision.dtype
    return "bf16" if device.is_cuda else faster_cpu_dtype(device.torch_device)
