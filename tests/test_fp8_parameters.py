"""FP8 parameters keep their first value in high precision, from which masters are made: it must be ours."""

import torch

from megatron_eso.parallel.te_adapter import set_parameter, version_of


class Quantized(torch.nn.Parameter):
    """Has what Transformer Engine's FP8 parameters have before there is an optimizer."""

    first_value = torch.full((4, 4), torch.nan)

    def get_high_precision_init_val(self):
        return self.first_value


def test_masters_will_be_made_from_our_initial_value_not_transformer_engines():
    parameter, value = Quantized(torch.zeros(4, 4)), torch.randn(4, 4)
    set_parameter(parameter, value)
    assert torch.equal(parameter, value)
    assert torch.equal(parameter.first_value, value)


def test_a_plain_parameter_is_set():
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    set_parameter(parameter, torch.tensor([1.0, 2.0, 3.0]))
    assert parameter.tolist() == [1.0, 2.0, 3.0]


def test_versions_are_read_up_to_what_is_no_number():
    assert version_of("2.11.0+a1b2") == (2, 11, 0)
    assert version_of("2.17.0.dev3") == (2, 17, 0)
    assert version_of("2.9rc1") == (2, 9)
