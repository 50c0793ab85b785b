"""Documents to packed rows: sources, tokenizer, streams, packing and the loaders built from them."""

from minimax_train.data.batch import MicroBatch
from minimax_train.data.config import DataConfig
from minimax_train.data.loader import RowLoader, build_train_loader, merge_states
from minimax_train.data.tokenizer import Tokenizer, load_tokenizer, prepare_tokenizer
from minimax_train.data.validation import ValidationRows, build_validation_rows

__all__ = [
    "DataConfig",
    "MicroBatch",
    "RowLoader",
    "Tokenizer",
    "ValidationRows",
    "build_train_loader",
    "build_validation_rows",
    "load_tokenizer",
    "merge_states",
    "prepare_tokenizer",
]
