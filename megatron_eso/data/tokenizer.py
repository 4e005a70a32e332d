"""Text to token ids and back: a ``tokenizer.json`` file, given or trained on the spot.

The tokenizer knows ordinary tokens and the end-of-document token. The model's mask token has one more id,
``vocab_size - 1``, which no text encodes to.
"""

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_eso.data.manifest import sha256_of
from megatron_eso.errors import DataError

END_OF_DOCUMENT = "<|endoftext|>"
MASK_MARK = "\u2591"  # shown for a token that is still masked
# Names under which published tokenizers keep their end-of-document token, in order of preference.
END_NAMES = (END_OF_DOCUMENT, "</s>", "<|end_of_text|>", "<eos>", "<|eot_id|>", "[SEP]")
# Text is encoded in pieces of at most this many characters, cut after a line end: the encoder needs
# tens of times the memory of its input, and one document may be a gigabyte.
PIECE_CHARACTERS = 1 << 20


class Tokenizer:
    """A loaded ``tokenizer.json``; ``vocab_size`` includes the model's mask token."""

    def __init__(self, path: Path, *, requires_end: bool = True) -> None:
        """Load a ``tokenizer.json``.

        Args:
            path: the file.
            requires_end: refuse a tokenizer without an end-of-document token; data needs one, an
                exported model does not.

        Raises:
            DataError: if it cannot be read, is empty, or has no end-of-document token.
        """
        self.path = path
        self._tokenizer = load_tokenizer(path)
        # "<|endoftext|>" within a text is ordinary characters: it must not end the document.
        self._tokenizer.encode_special_tokens = True
        known = self._tokenizer.get_vocab(with_added_tokens=True)
        if not known:
            raise DataError(f"tokenizer {path} has an empty vocabulary")
        self.vocab_size = max(known.values()) + 2
        self.mask_id = self.vocab_size - 1
        self.end_id: int | None = next((known[n] for n in END_NAMES if n in known), None)
        if requires_end and self.end_id is None:
            raise self._has_no_end()
        self.sha256 = sha256_of(path)

    @property
    def end_of_document_id(self) -> int:
        """Id of the end-of-document token."""
        if self.end_id is None:
            raise self._has_no_end()
        return self.end_id

    def _has_no_end(self) -> DataError:
        return DataError(
            f"tokenizer {self.path} has no end-of-document token; it needs one of "
            f"{', '.join(END_NAMES)}"
        )

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens around it."""
        if len(text) <= PIECE_CHARACTERS:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        return [token for piece in pieces_of(text) for token in self.encode(piece)]

    def encode_pieces(self, pieces: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Return the token ids of several short texts (see :func:`pieces_of`), encoded in one call."""
        encoded = self._tokenizer.encode_batch_fast(list(pieces), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids; each mask token becomes one visible character."""
        return decode(self._tokenizer, ids)

    def check_vocabulary(self, vocab_size: int, setting: str) -> None:
        """Refuse a vocabulary size that is not this tokenizer's plus the mask token.

        Raises:
            DataError: naming ``setting`` and both numbers.
        """
        if vocab_size != self.vocab_size:
            raise DataError(
                f"{setting}={vocab_size}, but tokenizer {self.path} has {self.vocab_size - 1} tokens "
                f"and the mask token makes {self.vocab_size}; set {setting}={self.vocab_size}"
            )


def train_tokenizer(texts: Iterator[str], *, vocab_size: int, path: Path) -> None:
    """Train a byte-level BPE tokenizer and write it to ``path``.

    Args:
        texts: documents to train on.
        vocab_size: size of the model's vocabulary, mask token included; the tokenizer gets one token less.
        path: file to write.

    Raises:
        DataError: if the vocabulary cannot hold the 256 bytes, the end token and the mask token, or
            there is too little text to fill it.
    """
    from tokenizers import Tokenizer as Core
    from tokenizers import decoders, models, pre_tokenizers, trainers

    require_trainable(vocab_size)
    core = Core(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    if core.get_vocab_size() != vocab_size - 1:
        raise DataError(
            f"--vocab-size {vocab_size} is more than the text can fill: training found "
            f"{core.get_vocab_size()} tokens; set --vocab-size {core.get_vocab_size() + 1} or give "
            "more text"
        )
    core.save(str(path))


def require_trainable(vocab_size: int) -> None:
    """Refuse a vocabulary that cannot hold what every trained tokenizer has."""
    if vocab_size < 258:
        raise DataError(
            f"--vocab-size {vocab_size} is too small: 256 bytes, the end-of-document token and the "
            "mask token need 258"
        )


def load_tokenizer(path: Path) -> Any:
    """Return the ``tokenizers.Tokenizer`` of a tokenizer.json, with truncation and padding off.

    Raises:
        DataError: if it is missing or damaged.
    """
    from tokenizers import Tokenizer as Core

    if not path.is_file():
        raise DataError(f"tokenizer file {path} does not exist")
    try:
        core = Core.from_file(str(path))
    except Exception as error:  # the Rust side raises bare Exception for anything
        raise DataError(f"{path} is not a tokenizer.json file: {error}") from None
    core.no_truncation()
    core.no_padding()
    return core


def decode(tokenizer: Any, ids: Iterable[int]) -> str:
    """Return the text of token ids; an id that the tokenizer lacks (the mask) becomes a gray block."""
    parts: list[str] = []
    run: list[int] = []
    for token in ids:
        if tokenizer.id_to_token(int(token)) is not None:  # a vocabulary may have gaps
            run.append(int(token))
            continue
        parts += [tokenizer.decode(run, skip_special_tokens=False), MASK_MARK]
        run = []
    return "".join([*parts, tokenizer.decode(run, skip_special_tokens=False)])


def pieces_of(text: str) -> Iterator[str]:
    """Yield a text in pieces of at most PIECE_CHARACTERS, cut after a line end if there is one."""
    begin = 0
    while begin < len(text):
        end = begin + PIECE_CHARACTERS
        if end < len(text):
            line_end = text.rfind("\n", begin, end)
            end = line_end + 1 if line_end >= begin else end
        yield text[begin:end]
        begin = end


def tokenizer_file(name: str) -> Path | None:
    """Return the file that a name means: itself, or the one in the folder; None if it means no file.

    Raises:
        DataError: for a folder without a tokenizer.json.
    """
    given = Path(name)
    file = given / "tokenizer.json" if given.is_dir() else given
    if given.is_dir() and not file.is_file():
        raise DataError(f"--tokenizer {name} is a folder without a tokenizer.json")
    return file if file.is_file() else None


def resolve_tokenizer(name: str, path: Path) -> None:
    """Copy a tokenizer, from a file or from the Hugging Face hub, to ``path``.

    Raises:
        DataError: if ``name`` is neither a file, a folder with a tokenizer.json, nor a known name.
    """
    file = tokenizer_file(name)
    if file is not None:
        load_tokenizer(file)
        shutil.copyfile(file, path)
        return
    from tokenizers import Tokenizer as Core

    try:
        Core.from_pretrained(name).save(str(path))
    except Exception as error:  # the Rust side raises bare Exception for anything
        raise DataError(
            f"--tokenizer {name} is neither a file nor a folder with a tokenizer.json, and could not be "
            f"fetched by name: {error}"
        ) from None


def vocabulary_of(name: str | None) -> int:
    """Return the vocabulary size, mask token included, of a tokenizer given by file or name.

    Raises:
        DataError: if no tokenizer is given: to train one, a size is needed.
    """
    if name is None:
        raise DataError(
            "give --vocab-size to train a tokenizer of that size, or --tokenizer to use one"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        resolve_tokenizer(name, path)
        return Tokenizer(path).vocab_size
