"""Held-out scores of a run in progress. A stop signal ends an evaluation early."""

import logging
from collections.abc import Callable
from contextlib import nullcontext

import torch

from megatron_eso.config.schema import RunConfig
from megatron_eso.data.fits import naming
from megatron_eso.data.reader import RowReader, ValidationReader
from megatron_eso.errors import DataError
from megatron_eso.eval.evaluate import evaluate
from megatron_eso.eval.scores import Score
from megatron_eso.eval.unigram import unigram_score
from megatron_eso.objective.build import predicted
from megatron_eso.parallel.exchange import Rows
from megatron_eso.parallel.optimizer import whole_weights
from megatron_eso.train.session import Session

log = logging.getLogger(__name__)
_UNIGRAM_ROWS = 2048  # training rows that the unigram comparison counts


class StopAskedError(Exception):
    """A stop signal came during an evaluation. Raised on all ranks at the same place."""


class Validation:
    """The validation sets of a run."""

    def __init__(self, config: RunConfig, tokenizer_sha256: str | None = None) -> None:
        self._readers: dict[str, ValidationReader] = {}
        for name, path in config.data.validation.items():
            with naming(f"data.validation.{name}"):
                self._readers[name] = ValidationReader(
                    path,
                    config.data,
                    sequence_length=config.train.sequence_length,
                    vocab_size=config.model.vocab_size,
                    tokenizer_sha256=tokenizer_sha256,
                )

    def scores(self, session: Session, between: Callable[[], None]) -> dict[str, list[Score]]:
        """Return the scores of every set.

        Args:
            session: the run.
            between: called by all ranks before each round of micro-batches; may raise on all of them.
        """
        if not self._readers:
            return {}
        chunks, average = session.chunks, session.average if session.config.eval.use_ema else None
        averaged = nullcontext() if average is None else average.applied(chunks)
        with whole_weights(chunks), averaged:
            return {
                name: _score(session, reader, between) for name, reader in self._readers.items()
            }

    def unigram(self, config: RunConfig, training: RowReader) -> dict[str, Score]:
        """Score the validation sets with the token frequencies of (some of) the training data.

        A run can do without: if data cannot be read, this logs why and returns nothing.
        """
        try:
            return self._unigram(config, training) if self._readers else {}
        except DataError as error:
            log.warning("no unigram model to compare with: %s", error)
            return {}

    def _unigram(self, config: RunConfig, training: RowReader) -> dict[str, Score]:
        examples = training.example_rows(_UNIGRAM_ROWS)
        counted = torch.from_numpy(examples.tokens[examples.is_valid])
        scores = {}
        for name, reader in self._readers.items():
            rows = list(range(min(config.eval.num_rows, reader.num_rows)))
            held_out = reader.read(rows)
            scores[name] = unigram_score(
                counted,
                predicted(torch.from_numpy(held_out.tokens), config.objective),
                predicted(torch.from_numpy(held_out.is_valid), config.objective),
                vocab_size=config.model.vocab_size,
                bytes_per_token=reader.bytes_per_token,
            )
        return scores


def _score(session: Session, reader: ValidationReader, between: Callable[[], None]) -> list[Score]:
    def read(rows: list[int]) -> Rows:
        got = reader.read(rows)
        return Rows(torch.from_numpy(got.tokens), torch.from_numpy(got.is_valid))

    try:
        return evaluate(
            session.replica,
            read,
            num_rows=min(session.config.eval.num_rows, reader.num_rows),
            bytes_per_token=reader.bytes_per_token,
            between=between,
        )
    finally:
        for chunk in session.chunks:
            chunk.train()
