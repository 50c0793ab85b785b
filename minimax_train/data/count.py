"""How many tokens one pass over the training documents gives."""

from __future__ import annotations

from minimax_train.data.config import MEGATRON, DataConfig
from minimax_train.data.held_out import kept_in_training
from minimax_train.data.sources import TRAIN, open_sources
from minimax_train.data.streams import DocumentStream, Lengths
from minimax_train.data.token_files import TokenFile
from minimax_train.data.tokenizer import Tokenizer


def count_tokens(config: DataConfig, tokenizer: Tokenizer) -> int:
    """Tokens of one epoch of the only source, each document's end included, held-out documents left out. Token files of
    which nothing is held out are counted by their index; anything else is read and tokenised, all of it.

    Raises:
        ConfigError: when the source cannot be read.
    """
    ((name, source),) = open_sources(config, TRAIN).items()
    source, keeps = source.with_tokenizer(tokenizer), kept_in_training(config, tokenizer)[name]
    if source.format == MEGATRON and keeps is None:
        return sum(TokenFile(file).num_tokens(tokenizer.eos_id) for file in source.files)
    lengths = Lengths(config.medium_length, config.long_length)
    stream = DocumentStream.once(source, tokenizer, lengths=lengths, path=config.path_of(name), keeps=keeps)
    tokens = 0
    while (document := stream.next_document()) is not None:
        tokens += sum(len(piece) for piece in document.pieces)
    return tokens
