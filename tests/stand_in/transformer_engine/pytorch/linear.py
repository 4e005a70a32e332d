"""Linear layers: column or row parallel, with or without a norm before."""

import torch
from torch.nn.functional import linear

from transformer_engine.common.recipe import DelayedScaling
from transformer_engine.pytorch.distributed import EnterColumn, LeaveRow
from transformer_engine.pytorch.fp8 import FP8GlobalStateManager, Stateful
from transformer_engine.pytorch.module.base import use_buffer
from transformer_engine.pytorch.norms import normalise


class _AddsToMainGrad(torch.autograd.Function):
    """Adds the weight's gradient to ``main_grad``; what autograd hands on is memory with anything in it."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        weight.main_grad.add_(grad.flatten(0, -2).t() @ x.flatten(0, -2))
        weight.grad_added_to_main_grad = True
        return grad @ weight, torch.full_like(weight, torch.nan)


class Linear(Stateful):
    def __init__(self, in_features, out_features, sequence_parallel=False,
                 fuse_wgrad_accumulation=False, tp_group=None, tp_size=1, get_rng_state_tracker=None,
                 init_method=None, bias=True, return_bias=False, params_dtype=None,
                 parallel_mode=None, parameters_split=None, device="cuda", rng_tracker_name=None,
                 ub_overlap_ag=False, ub_overlap_rs=False, ub_name=None, **_):  # fmt: skip
        super().__init__()
        self.ub_overlap_ag, self.ub_overlap_rs, self.ub_name = ub_overlap_ag, ub_overlap_rs, ub_name
        assert tp_group is None or tp_group.size() == tp_size
        self.tp_group, self.tp_size, self.parallel_mode = tp_group, tp_size, parallel_mode
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.sequence_parallel = sequence_parallel and tp_size > 1
        self.use_bias, self.return_bias = bias, return_bias
        self.in_features = in_features // (tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (tp_size if parallel_mode == "column" else 1)
        where = {"dtype": params_dtype, "device": device}
        weight = torch.empty(self.out_features, self.in_features, **where)
        self.weight = torch.nn.Parameter(weight)
        self._mark(self.weight, dim=1 if parallel_mode == "row" else 0)
        self.bias = torch.empty(0, **where)
        if bias:
            self.bias = torch.nn.Parameter(torch.zeros(self.out_features, **where))
            if parallel_mode == "row":
                self.bias.sequence_parallel = sequence_parallel
            elif parallel_mode == "column":
                self._mark(self.bias, dim=0)
        if init_method is not None:
            init_method(self.weight)

    def _use_buffers(self, x):
        """As the real layers do: gathering without gradients takes none, scattering always does."""
        tokens = x.numel() // x.shape[-1]
        if self.parallel_mode == "column" and self.ub_overlap_ag and torch.is_grad_enabled():
            use_buffer(f"{self.ub_name}_fprop", tokens * self.tp_size)
        if self.parallel_mode == "row" and self.ub_overlap_rs:
            use_buffer(f"{self.ub_name}_fprop", tokens)

    @staticmethod
    def _mark(parameter, dim):
        parameter.tensor_model_parallel, parameter.partition_dim = True, dim
        parameter.partition_stride = 1

    def forward(self, x, is_first_microbatch=None):
        is_parallel = self.tp_size > 1
        self._use_buffers(x)
        if is_parallel and self.parallel_mode == "column":
            x = EnterColumn.apply(x, self.tp_group, self.sequence_parallel)
        recipe = FP8GlobalStateManager.recipe
        if recipe is not None:
            is_delayed = isinstance(recipe, DelayedScaling)
            x = self.rounded(x, recipe.amax_history_len if is_delayed else 0)
        adds_bias = self.use_bias and not self.return_bias and self.parallel_mode != "row"
        if self.fuse_wgrad_accumulation and hasattr(self.weight, "main_grad"):
            out = _AddsToMainGrad.apply(x, self.weight)
            out = out + self.bias if adds_bias else out
        else:
            out = linear(x, self.weight, self.bias if adds_bias else None)
        if is_parallel and self.parallel_mode == "row":
            out = LeaveRow.apply(out, self.tp_group, self.sequence_parallel)
        if self.use_bias and not self.return_bias and not adds_bias:
            out = out + self.bias
        return (out, self.bias) if self.return_bias else out


class LayerNormLinear(Linear):
    def __init__(self, in_features, out_features, eps=1e-5, normalization="LayerNorm",
                 return_layernorm_output=False, zero_centered_gamma=False, sequence_parallel=False,
                 params_dtype=None, device="cuda", **settings):  # fmt: skip
        super().__init__(in_features, out_features, sequence_parallel=sequence_parallel,
                         params_dtype=params_dtype, device=device, **settings)  # fmt: skip
        assert not return_layernorm_output and not zero_centered_gamma
        self.eps, self.normalization = eps, normalization
        where = {"dtype": params_dtype, "device": device}
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(in_features, **where))
        self.layer_norm_weight.sequence_parallel = sequence_parallel
        self.layer_norm_bias = None
        if normalization == "LayerNorm":
            self.layer_norm_bias = torch.nn.Parameter(torch.zeros(in_features, **where))
            self.layer_norm_bias.sequence_parallel = sequence_parallel

    def forward(self, x, is_first_microbatch=None):
        weight, bias = self.layer_norm_weight, self.layer_norm_bias
        return super().forward(normalise(x, self.normalization, weight, bias, self.eps))


class GroupedLinear(torch.nn.Module):
    """Of mixtures of experts, which are not used."""
