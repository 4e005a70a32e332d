"""The unigram model with which a trained model is compared."""

import json
import math

import pytest
import torch

from megatron_eso.eval.scores import score
from megatron_eso.eval.unigram import unigram_score


def test_counts_plus_one_score_the_tokens_that_are_no_padding():
    train = torch.tensor([0, 0, 0, 1])
    held_out = torch.tensor([[0, 1, 2], [2, 3, 3]])
    is_valid = torch.tensor([[True, True, True], [True, False, False]])
    found = unigram_score(train, held_out, is_valid, vocab_size=5, bytes_per_token=2.0)
    # Four ids besides the mask token, with counts 3, 1, 0, 0, plus one each, out of eight.
    expected = -(math.log(4 / 8) + math.log(2 / 8) + 2 * math.log(1 / 8)) / 4
    assert found.nats_per_token == pytest.approx(expected)
    assert found.num_tokens == 4
    assert found.metric == "unigram of the training data"


def test_the_error_of_one_row_is_unknown():
    row = torch.tensor([12.0]), torch.tensor([4.0])
    one = score("nelbo", *row, bytes_per_token=3.0)
    assert one.nats_per_token == 3 and one.standard_error is None and one.shown_error() == "?"
    assert json.loads(json.dumps(one.as_dict()))["standard_error"] is None
    two = score("nelbo", torch.tensor([12.0, 8.0]), torch.tensor([4.0, 4.0]), bytes_per_token=3.0)
    # Rates 3 and 2 deviate by 0.5 each, with one degree of freedom, for the mean of two.
    assert two.standard_error == pytest.approx(0.5) and two.shown_error() == "0.5000"
