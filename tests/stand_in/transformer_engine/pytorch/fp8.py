"""The FP8 region, and the state that a layer carries through it."""

import io
from contextlib import contextmanager

import torch
import torch.distributed as dist

_LARGEST = 448.0  # of e4m3


class FP8GlobalStateManager:
    recipe = None
    group = None

    @classmethod
    def is_fp8_enabled(cls):
        return cls.recipe is not None

    @classmethod
    def get_fp8_recipe(cls):
        return cls.recipe

    @classmethod
    def reset(cls):
        cls.recipe = None


@contextmanager
def fp8_autocast(enabled=True, calibrating=False, fp8_recipe=None, fp8_group=None, **_):
    manager = FP8GlobalStateManager
    before = manager.recipe, manager.group
    manager.recipe, manager.group = (fp8_recipe, fp8_group) if enabled else (None, None)
    try:
        yield
    finally:
        manager.recipe, manager.group = before


@contextmanager
def fp8_model_init(enabled=True, recipe=None, preserve_high_precision_init_val=False):
    raise NotImplementedError("the stand-in has no FP8 parameters")
    yield


class Stateful(torch.nn.Module):
    """A module whose inputs are rounded with scales of earlier calls, as delayed scaling does."""

    def __init__(self):
        super().__init__()
        self.fp8_meta = {}
        self.history = torch.empty(0)
        self.save_original_input = False

    def rounded(self, x, length):
        """Return x rounded to e4m3, by the largest value of the ``length`` calls before, or its own."""
        amax = x.detach().abs().amax().float()
        group = FP8GlobalStateManager.group
        if group is not None and group.size() > 1:
            dist.all_reduce(amax, dist.ReduceOp.MAX, group=group)
        past = self.history.amax() if self.history.numel() else torch.ones(())
        if length:
            self.history = torch.cat([amax.view(1), self.history])[:length]
        else:
            past = amax
        scale = _LARGEST / past.clamp(min=1e-12)
        fp8 = (x.detach().float() * scale).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
        return x + ((fp8.float() / scale).to(x.dtype) - x.detach())

    def get_extra_state(self):
        if not self.history.numel():
            return torch.empty(0, dtype=torch.uint8)
        buffer = io.BytesIO()
        torch.save(self.history, buffer)
        return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)

    def set_extra_state(self, state):
        if state is not None and state.numel():
            self.history = torch.load(io.BytesIO(state.numpy().tobytes()))
