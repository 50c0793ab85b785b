"""Documents to packed sequences: sources, tokenizer, streams, packing and the loaders built from them."""

from minimax_train.data.batch import MicroBatch
from minimax_train.data.config import SKIP, DataConfig
from minimax_train.data.loader import SequenceLoader, build_train_loader, merge_states
from minimax_train.data.tokenizer import Tokenizer, load_tokenizer, prepare_tokenizer
from minimax_train.data.validation import ValidationSequences, build_validation_sequences

__all__ = [
    "SKIP",
    "DataConfig",
    "MicroBatch",
    "SequenceLoader",
    "Tokenizer",
    "ValidationSequences",
    "build_train_loader",
    "build_validation_sequences",
    "load_tokenizer",
    "merge_states",
    "prepare_tokenizer",
]
