"""The unigram model with which a trained model is compared."""

import json
import math

import pytest
import torch

from megatron_eso.eval.scores import LogMeanExp, is_power_of_ten, score
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
    assert two.bits_per_byte == pytest.approx(2.5 / math.log(2) / 3)


def test_rows_of_different_lengths_deviate_from_the_common_rate():
    found = score("nelbo", torch.tensor([8.0, 2.0]), torch.tensor([4.0, 1.0]), bytes_per_token=1.0)
    assert found.standard_error == pytest.approx(0.0, abs=1e-6)


def test_a_score_beyond_all_perplexities_is_still_a_score():
    row = torch.tensor([2000.0]), torch.tensor([2.0])
    assert score("nelbo", *row, bytes_per_token=1.0).perplexity == pytest.approx(math.exp(700))


def test_a_bound_is_the_log_of_the_mean_and_told_at_powers_of_ten():
    bound = LogMeanExp()
    for probability in (0.1, 0.3, 0.8):
        bound.add(torch.tensor([math.log(probability)]))
    assert float(bound.value) == pytest.approx(math.log(0.4))
    assert [n for n in range(1, 1001) if is_power_of_ten(n)] == [1, 10, 100, 1000]
