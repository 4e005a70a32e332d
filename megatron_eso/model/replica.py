"""A model on this rank together with its place: what evaluation and sampling need."""

from dataclasses import dataclass

import torch
from torch import nn

from megatron_eso.config.schema import RunConfig
from megatron_eso.parallel.groups import Layout


@dataclass(frozen=True)
class Replica:
    """One rank's share of a model replica."""

    config: RunConfig
    layout: Layout
    device: torch.device
    chunks: list[nn.Module]
