"""Communication of tensor and sequence parallelism, with its gradients."""

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint as torch_checkpoint


class CudaRNGStatesTracker:
    """Megatron subclasses it; its own tracker is the one in use."""

    def reset(self):
        self.states = {}

    def set_states(self, states):
        self.states = states

    def add(self, name, seed):
        self.states[name] = seed


def activation_recompute_forward(*args, **kwargs):
    raise NotImplementedError


def checkpoint(function, *args, use_reentrant=True, distribute_saved_activations=False,
               get_rng_state_tracker=None, tp_group=None, **kwargs):  # fmt: skip
    return torch_checkpoint(function, *args, use_reentrant=use_reentrant, **kwargs)


def _sum(x, group):
    x = x.contiguous().clone()
    dist.all_reduce(x, group=group)
    return x


def _own_part(x, group):
    return x.chunk(group.size())[group.rank()].contiguous()


def _gather(x, group):
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)


class EnterColumn(torch.autograd.Function):
    """Identity or gather along the row; backwards the sum, or each rank's part of it."""

    @staticmethod
    def forward(ctx, x, group, is_split):
        ctx.group, ctx.is_split = group, is_split
        return _gather(x, group) if is_split else x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = _sum(grad, ctx.group)
        return (_own_part(grad, ctx.group) if ctx.is_split else grad), None, None


class LeaveRow(torch.autograd.Function):
    """Sum over ranks, or each rank's part of it; backwards identity or gather."""

    @staticmethod
    def forward(ctx, x, group, is_split):
        ctx.group, ctx.is_split = group, is_split
        x = _sum(x, group)
        return _own_part(x, group) if is_split else x

    @staticmethod
    def backward(ctx, grad):
        return (_gather(grad, ctx.group) if ctx.is_split else grad), None, None


def is_fp8_activation_recompute_enabled():
    return False
