"""Tokenizers: train a byte-level BPE, load one, encode and decode."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_eso.errors import DataError

END_OF_DOCUMENT = "<|endoftext|>"
MASK_MARK = "\u2591"  # how an undecided token is shown


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE with ``vocab_size - 1`` ids (the last id is the mask token).

    Raises:
        DataError: if the text is too small for that many tokens.
    """
    if vocab_size < 258:
        raise DataError(
            f"--vocab-size {vocab_size} is too small: 256 bytes, a separator and the mask need 258"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size - 1:
        raise DataError(
            f"the text gives only {tokenizer.get_vocab_size() + 1} tokens; lower --vocab-size "
            f"{vocab_size}"
        )
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json.

    Raises:
        DataError: if it cannot be read.
    """
    if not path.is_file():
        raise DataError(f"tokenizer {path} does not exist")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{path} is not a tokenizer.json: {error}") from None


def end_of_document_id(tokenizer: Tokenizer) -> int:
    """Return the id of the separator between documents.

    Raises:
        DataError: if the tokenizer has none that we know.
    """
    for name in (END_OF_DOCUMENT, "</s>", "<|end_of_text|>", "<eos>"):
        found = tokenizer.token_to_id(name)
        if found is not None:
            return found
    raise DataError(f"the tokenizer has no end-of-document token ({END_OF_DOCUMENT} or </s>)")


def decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Return the text of token ids; ids beyond the tokenizer's (the mask) show as a grey block."""
    parts, run = [], []
    for token in ids:
        if token < tokenizer.get_vocab_size():
            run.append(token)
            continue
        parts += [tokenizer.decode(run, skip_special_tokens=False), MASK_MARK]
        run = []
    return "".join([*parts, tokenizer.decode(run, skip_special_tokens=False)])
