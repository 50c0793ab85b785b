"""Text to token ids and back: a byte-level BPE trained on the run's own documents, or any Hugging Face tokenizer."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from hashlib import blake2b
from itertools import chain, islice, zip_longest
from pathlib import Path

import numpy as np
import tokenizers

from minimax_train.data.config import TRAIN_TOKENIZER, DataConfig
from minimax_train.data.shuffle import permutation, stable_hash
from minimax_train.data.sources import TRAIN, Source, open_sources
from minimax_train.errors import ConfigError
from minimax_train.files import replace_text
from minimax_train.kernels.compile_cache import locked
from minimax_train.metrics.console import note

END_OF_TEXT = "<|endoftext|>"
_SMALLEST_VOCABULARY = 257  # every byte and the end of text
_TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"

LONG_DOCUMENT = 1 << 20  # characters; a longer one is encoded in pieces
_PIECE, _PIECES_TOGETHER = 1 << 16, 16
# Where a piece may end without another token than in the whole text: the pre-tokenizers of byte-level BPEs begin a
# token at a space between words, and at a line's first character if the line before is not blank.
_BETWEEN_TOKENS = re.compile(r"(?<=\S)(?= \S)|(?<=\S\n)(?=\S)")
_SEARCHED = 4096

# Of what :func:`train_bpe` does: another number when the same texts give another tokenizer.
_TRAINING = 1
# A word's share of BPE training grows with the square of its length: words longer than this are cut.
_LONG_WORD = 256
_ONE_WORD = re.compile(rf"[^\W_]{{{_LONG_WORD}}}|(?:[^\w\s]|_){{{_LONG_WORD}}}|\s{{{_LONG_WORD}}}")


class Tokenizer:
    """Encodes documents. Special tokens spelled out in a text are ordinary text: a document cannot end itself.

    Attributes:
        eos_id: the id that ends every document.
        vocab_size: one more than the largest id.
        is_byte_level: whether a text has at most as many tokens as bytes, and a space that is put before it.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eos_id: int) -> None:
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self.eos_id = eos_id
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.is_byte_level = backend.normalizer is None and "ByteLevel" in repr(backend.pre_tokenizer)

    def __reduce__(self) -> tuple:
        """For worker processes: what the constructor sets is not part of the backend's own pickle."""
        return Tokenizer, (self._backend, self.eos_id)

    def encode_document(self, text: str) -> np.ndarray:
        """The ids of a text, then the end of text: int64 ``[tokens + 1]``."""
        (ids,) = self.encode_documents([text])
        return ids

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The same of several texts, by as many threads as there are CPU cores.

        The interpreter lock is free meanwhile, for the training loop beside which this runs.
        """
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._ended(encoding.ids) for encoding in encodings]

    def _ended(self, ids: list[int]) -> np.ndarray:
        ids.append(self.eos_id)  # the list was made for this call; a copy would cost 3 %
        return np.array(ids, dtype=np.int64)

    def encode_in_pieces(self, text: str) -> Iterator[np.ndarray]:
        """The ids of :meth:`encode_document` one part after the other, int64, for documents of any length.

        A text longer than ``LONG_DOCUMENT`` is cut where byte-level BPEs begin a token anyway. Where there is no such
        place, as in an unbroken word, or with a tokenizer of another kind, the tokens at a cut may differ.
        """
        if len(text) <= LONG_DOCUMENT:
            yield self.encode_document(text)
            return
        pieces = _pieces(text)
        while together := list(islice(pieces, _PIECES_TOGETHER)):
            yield np.concatenate([ids[:-1] for ids in self.encode_documents(together)])
        yield np.array([self.eos_id], dtype=np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """The same of two tokenizers whose ids mean the same tokens."""
        named = sorted((i, token) for token, i in self._backend.get_vocab().items())
        return f"{stable_hash(self.eos_id, *named):016x}"

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of the ids, special tokens left out."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def has_ids_of(self, other: Tokenizer) -> bool:
        """Whether every id means the same token, so that weights trained with one serve the other."""
        return self.eos_id == other.eos_id and self._backend.get_vocab() == other._backend.get_vocab()


def prepare_tokenizer(
    config: DataConfig, vocab_size: int, directory: str | os.PathLike, cache: Path | None = None
) -> Tokenizer:
    """Trains or loads the configured tokenizer and saves it to ``directory``; called by one rank.

    If ``directory`` already holds a tokenizer, as in a resumed run, it is loaded and nothing is trained.

    Args:
        config: names the tokenizer, or the documents to train one on.
        vocab_size: ``model.vocab_size``: how many ids a trained tokenizer may have, or any other must fit in.
        directory: opens with ``transformers.AutoTokenizer.from_pretrained``.
        cache: a folder that keeps trained tokenizers: one trained on the same texts is taken from there.

    Raises:
        ConfigError: when the vocabulary does not fit, there is no end-of-text token, or the name cannot be loaded.
    """
    directory = Path(directory)
    if not (directory / _TOKENIZER_FILE).is_file():
        draft = directory / ".draft"  # the tokenizer appears whole or not at all
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        if config.tokenizer == TRAIN_TOKENIZER:
            _save_trained(_trained(config, vocab_size, cache), draft)
        else:
            _save_named(config.tokenizer, draft)
        tokenizer = load_tokenizer(draft)
        _check_vocabulary(tokenizer, vocab_size, f"data.tokenizer={config.tokenizer!r}")
        for file in sorted(draft.iterdir(), key=lambda file: file.name == _TOKENIZER_FILE):
            os.replace(file, directory / file.name)
        draft.rmdir()
    tokenizer = load_tokenizer(directory)
    _check_vocabulary(tokenizer, vocab_size, f"the tokenizer in {str(directory)!r}")
    return tokenizer


def load_tokenizer(directory: str | os.PathLike) -> Tokenizer:
    """The tokenizer that :func:`prepare_tokenizer` saved; called by every other rank.

    Raises:
        ConfigError: when the directory holds none, or it has no end-of-text token.
    """
    directory = Path(directory)
    try:
        backend = tokenizers.Tokenizer.from_file(str(directory / _TOKENIZER_FILE))
        settings = json.loads((directory / _CONFIG_FILE).read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises bare Exception
        raise ConfigError(f"no tokenizer in {str(directory)!r}: {error}") from error
    eos = settings.get("eos_token") if isinstance(settings, dict) else None
    eos = eos.get("content") if isinstance(eos, dict) else eos
    eos_id = backend.token_to_id(eos) if isinstance(eos, str) else None
    if eos_id is None:
        raise ConfigError(f"the tokenizer in {str(directory)!r} has no end-of-text token (eos_token={eos!r})")
    return Tokenizer(backend, eos_id)


def train_bpe(documents: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE: every byte is a token, so any text comes back exactly. The same documents give the same BPE.

    Of a document the first ``LONG_DOCUMENT`` characters count; words of more than 256 characters are cut.

    Raises:
        ConfigError: when ``vocab_size`` cannot hold the 256 bytes and the end of text.
    """
    if vocab_size < _SMALLEST_VOCABULARY:
        raise ConfigError(f"model.vocab_size={vocab_size}: a byte-level BPE needs at least {_SMALLEST_VOCABULARY}")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(chain.from_iterable(map(_without_long_words, documents)), trainer)
    return backend


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = start + _PIECE
        if end < len(text):
            for place in _BETWEEN_TOKENS.finditer(text, end - _SEARCHED, end):
                end = place.start()
        yield text[start:end]
        start = end


def _without_long_words(text: str) -> Iterator[str]:
    """A text cut inside of runs of letters and digits, of other signs, or of white space."""
    start, text = 0, text[:LONG_DOCUMENT]
    for at in range(0, len(text) - _LONG_WORD, _LONG_WORD):
        if _ONE_WORD.match(text, at):
            yield text[start : at + _LONG_WORD]
            start = at + _LONG_WORD
    yield text[start:]


def _trained(config: DataConfig, vocab_size: int, cache: Path | None) -> tokenizers.Tokenizer:
    """The tokenizer that training gives, from the cache if it is there."""
    if cache is None:
        return train_bpe(_training_texts(config), vocab_size)
    # Of the texts themselves: a digest of a file's ends would not see a change between them. Reading is the least part.
    key = blake2b(f"{_TRAINING} {tokenizers.__version__} {vocab_size}".encode(), digest_size=16)
    for text in _training_texts(config):
        encoded = text.encode(errors="surrogatepass")
        key.update(len(encoded).to_bytes(8, "little") + encoded)
    kept = cache / "tokenizers" / f"{key.hexdigest()}.json"
    if (backend := _kept(kept)) is not None:
        note(f"reusing the tokenizer that was trained on the same documents before: {kept}")
        return backend
    backend = train_bpe(_training_texts(config), vocab_size)
    try:
        kept.parent.mkdir(exist_ok=True)
        with locked(kept.parent / "lock"):  # other runs write there
            replace_text(kept, backend.to_str(pretty=True))
    except OSError as error:
        note(f"{kept}: the tokenizer could not be kept for later runs: {error.strerror}")
    return backend


def _kept(file: Path) -> tokenizers.Tokenizer | None:
    try:
        return tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception:  # absent, or cut short by a full disk; tokenizers raises bare Exception
        return None


def _training_texts(config: DataConfig) -> Iterator[str]:
    """What a tokenizer is trained on."""
    sources = open_sources(config, TRAIN)
    tokens = [source.description for source in sources.values() if source.is_tokens]
    if tokens:
        raise ConfigError(
            f"data.tokenizer={TRAIN_TOKENIZER!r}: {tokens[0]} holds tokens: must be the tokenizer that made them"
        )
    dealt = [_texts(source) for source in sources.values()]
    first = [next(texts, None) for texts in dealt]
    for source, text in zip(sources.values(), first, strict=True):
        if text is None:
            raise ConfigError(f"{source.description}: holds no document to train a tokenizer on")
    # In turns, as long as each lasts.
    rest = (text for turn in zip_longest(*dealt) for text in turn)
    return islice((text for text in chain(first, rest) if text), config.tokenizer_documents)


def _texts(source: Source) -> Iterator[str]:
    # Shards in a drawn order: the first documents of a sorted list of files are all of a kind.
    order = permutation(len(source.shards), "tokenizer")
    read = (document.content for shard in order for document in source.read(shard) if isinstance(document.content, str))
    return (text[:LONG_DOCUMENT] for text in read)  # all that training looks at


def _save_trained(backend: tokenizers.Tokenizer, directory: Path) -> None:
    backend.save(str(directory / _TOKENIZER_FILE))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    (directory / _CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _save_named(name: str, directory: Path) -> None:
    import transformers  # takes seconds, and a trained tokenizer does not need it

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:
        where = "" if os.path.isdir(name) else "no folder here, and as a name on the Hugging Face hub it "
        cause = f"{type(error).__name__}: {error}"
        raise ConfigError(f"data.tokenizer={name!r}: {where}cannot be loaded: {cause}") from error
    if tokenizer is None or tokenizer.eos_token is None:
        raise ConfigError(f"data.tokenizer={name!r}: has no end-of-text token, which must end every document")
    tokenizer.save_pretrained(directory)
    if not (directory / _TOKENIZER_FILE).is_file():
        raise ConfigError(f"data.tokenizer={name!r}: has no {_TOKENIZER_FILE} (no fast form), which is needed")


def _check_vocabulary(tokenizer: Tokenizer, vocab_size: int, what: str) -> None:
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size}: {what} has {tokenizer.vocab_size} ids; "
            f"model.vocab_size must be at least {tokenizer.vocab_size}"
        )
