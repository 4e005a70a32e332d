"""Only the base class that Megatron looks for: there are no FP8 parameters here."""

import torch


class QuantizedTensor(torch.Tensor):
    pass
