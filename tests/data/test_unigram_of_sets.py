"""A run's validation sets: their unigram score is of the tokens that the model is scored on."""

from unittest import mock

import pytest
import torch

from megatron_eso.config import load_config
from megatron_eso.data.reader import RowReader, ValidationReader
from megatron_eso.errors import DataError
from megatron_eso.eval.unigram import unigram_score
from megatron_eso.train.validation import Validation
from tests.data.conftest import SEQUENCE_LENGTH, VOCAB_SIZE


@pytest.mark.parametrize(("leading_mask", "first"), [("true", 0), ("false", 1)])
def test_it_scores_what_the_objective_predicts(prepared, leading_mask, first):
    config = load_config(None, [
        "objective.name=ar", f"objective.leading_mask={leading_mask}", "train.steps=1", "eval.num_rows=20",
        f"train.sequence_length={SEQUENCE_LENGTH}", f"model.vocab_size={VOCAB_SIZE}",
        f"data.sources=[{{path: {prepared}/train}}]", f"data.validation.held_out={prepared}/validation",
    ])  # fmt: skip
    training = RowReader(
        config.data,
        global_batch_rows=4,
        sequence_length=SEQUENCE_LENGTH,
        vocab_size=VOCAB_SIZE,
        seed=1,
    )
    found = Validation(config).unigram(config, training)["held_out"]
    reader = ValidationReader(
        f"{prepared}/validation", sequence_length=SEQUENCE_LENGTH, vocab_size=VOCAB_SIZE
    )
    rows = reader.read(range(20))
    examples = training.example_rows(2048)
    expected = unigram_score(
        torch.from_numpy(examples.tokens[examples.is_valid]),
        torch.from_numpy(rows.tokens[:, first : first + SEQUENCE_LENGTH]),
        torch.from_numpy(rows.is_valid[:, first : first + SEQUENCE_LENGTH]),
        vocab_size=VOCAB_SIZE,
        bytes_per_token=reader.bytes_per_token,
    )
    assert found == expected


def test_a_finished_run_can_do_without_it(prepared, caplog):
    """Only rank 0 computes it, after the last checkpoint; shards out of reach must not fail the run."""
    training = mock.Mock(spec=RowReader)
    training.example_rows.side_effect = DataError("shard.00000.mds cannot be fetched")
    config = load_config(None, [
        f"train.sequence_length={SEQUENCE_LENGTH}", f"model.vocab_size={VOCAB_SIZE}", "train.steps=1",
        f"data.validation.held_out={prepared}/validation",
    ])  # fmt: skip
    assert Validation(config).unigram(config, training) == {}
    assert "shard.00000.mds cannot be fetched" in caplog.text


def test_without_validation_sets_no_training_data_is_read_for_it():
    training = mock.Mock(spec=RowReader)
    config = load_config(None, ["train.steps=1"])
    assert Validation(config).unigram(config, training) == {}
    training.example_rows.assert_not_called()


def test_a_validation_set_that_is_missing_is_named_by_its_setting(prepared):
    sets = f"{{there: {prepared}/validation, gone: {prepared}/none}}"
    config = load_config(None, [
        f"data.validation={sets}", f"train.sequence_length={SEQUENCE_LENGTH}",
        f"model.vocab_size={VOCAB_SIZE}",
    ])  # fmt: skip
    with pytest.raises(DataError, match=r"^data\.validation\.gone: .*/none does not exist"):
        Validation(config)
