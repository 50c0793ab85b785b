"""Documents as text, read through ``datasets`` in streaming mode, one shard (file) at a time.

The position of a reader is (shard, row), kept here. The iterator state of ``datasets`` is not used: it has lost or
repeated rows in several releases (huggingface/datasets#7538, #8145, #8308), and it cannot say which file is corrupt.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from itertools import chain
from typing import Any

import datasets
import pyarrow as pa

from minimax_train.data.config import DataConfig
from minimax_train.data.files import match_files, stdlib_files
from minimax_train.data.shuffle import stable_hash
from minimax_train.errors import ConfigError

TRAIN, VALIDATION = "train", "validation"
_ROWS_PER_READ = 256


@dataclass(frozen=True)
class Source:
    """One split of a data set, open for streaming.

    Attributes:
        description: the configuration field it comes from, for messages.
        dataset: the streaming data set, in Arrow format.
        shards: a name for each shard; a shard is a file, or what the hub's loader makes of one.
        text_column: the column that holds the text.
        fingerprint: changes with the list of shards; a saved position is valid only under the same.
    """

    description: str
    dataset: datasets.IterableDataset
    shards: Sequence[str]
    text_column: str
    fingerprint: str

    def read(self, shard: int, start_row: int = 0) -> Iterator[tuple[int, str]]:
        """(row, text) of a shard's documents from ``start_row`` on; null and empty texts are passed over.

        Raises:
            ConfigError: naming the field and the shard when it is corrupt, or has no such column of text.
        """
        one_shard = self.dataset.shard(num_shards=len(self.shards), index=shard, contiguous=False)
        row = 0
        tables = one_shard.iter(batch_size=_ROWS_PER_READ)
        while True:
            try:
                table = next(tables, None)
            except Exception as error:
                raise ConfigError(
                    f"{self.description}: cannot read {self.shards[shard]!r}: {type(error).__name__}: {error}"
                ) from error
            if table is None:
                return
            if row + len(table) > start_row:
                first = max(start_row - row, 0)
                texts = self._texts(table, self.shards[shard]).slice(first).to_pylist()
                yield from ((i, text) for i, text in enumerate(texts, row + first) if text)
            row += len(table)

    def documents(self) -> Iterator[str]:
        """Every document once, shard by shard, in the order of the shards."""
        return (text for _, text in chain.from_iterable(self.read(shard) for shard in range(len(self.shards))))

    def _texts(self, table: pa.Table, shard: str) -> pa.ChunkedArray:
        if self.text_column not in table.column_names:
            raise ConfigError(_missing_column(self.text_column, shard, table.column_names))
        texts = table.column(self.text_column)
        if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type) or pa.types.is_null(texts.type)):
            raise ConfigError(f"data.text_column={self.text_column!r}: holds {texts.type} in {shard!r}, must hold text")
        return texts


def open_source(config: DataConfig, split: str) -> Source:
    """Opens the ``train`` or ``validation`` part of the configured data set, without reading its documents.

    Raises:
        ConfigError: naming the field and its value, when files are missing or unreadable, the data set or split does
            not exist, or the text column is known to be missing.
    """
    if split == VALIDATION and not config.has_validation:
        field = "validation_files=[]" if config.source == "files" else "validation_split=None"
        raise ConfigError(f"data.{field}: evaluation needs held-out documents; name some or switch evaluation off")
    if config.source == "hub":
        return _open_hub(config, split)
    if config.source == "stdlib":
        files = stdlib_files(held_out=split == VALIDATION)
        return _open_files("data.source='stdlib'", files, config.source, config.text_column)
    field = f"{split}_files"
    patterns = list(getattr(config, field))
    shown = f"[{', '.join(map(repr, patterns[:3]))}{', ...' if len(patterns) > 3 else ''}]"
    return _open_files(f"data.{field}={shown}", match_files(field, patterns), config.format, config.text_column)


def _open_files(description: str, files: list[str], file_format: str, text_column: str) -> Source:
    builder, options = {
        # One document per file; a byte that is not UTF-8 becomes U+FFFD.
        "text": ("text", {"sample_by": "document", "encoding_errors": "replace"}),
        "stdlib": ("text", {"sample_by": "document", "encoding_errors": "replace"}),
        "json": ("json", {}),
        "parquet": ("parquet", {"columns": [text_column]}),
    }[file_format]
    data_files = {TRAIN: [escape(file) for file in files]}
    # The columns are learnt from the first file, so that is the one that cannot be opened.
    opening = f"{description}, first file {files[0]!r}"
    dataset = _load(opening, builder, data_files=data_files, split=TRAIN, **options)
    if file_format == "parquet" and text_column not in (dataset.features or ()):
        columns = _load(opening, builder, data_files=data_files, split=TRAIN).column_names or []
        raise ConfigError(_missing_column(text_column, files[0], columns))
    if dataset.column_names and text_column not in dataset.column_names:
        raise ConfigError(_missing_column(text_column, files[0], dataset.column_names))
    assert dataset.num_shards == len(files), f"{dataset.num_shards} shards from {len(files)} files"
    sizes = ((os.path.basename(file), os.path.getsize(file)) for file in files)
    return Source(description, dataset, files, text_column, f"{stable_hash(*chain.from_iterable(sizes)):016x}")


def _open_hub(config: DataConfig, part: str) -> Source:
    split = config.train_split if part == TRAIN else config.validation_split
    assert config.name is not None and split is not None
    description = f"data.name={config.name!r} (subset {config.subset!r}, split {split!r})"
    dataset = _load(description, config.name, name=config.subset, revision=config.revision, split=split)
    if dataset.column_names and config.text_column not in dataset.column_names:
        raise ConfigError(_missing_column(config.text_column, f"{config.name} {split}", dataset.column_names))
    shards = [f"{config.name} {split} shard {i}" for i in range(dataset.num_shards)]
    fingerprint = stable_hash(config.name, config.subset, config.revision, split, len(shards))
    return Source(description, dataset, shards, config.text_column, f"{fingerprint:016x}")


def _load(description: str, path: str, **options: Any) -> datasets.IterableDataset:
    try:
        with _quiet():
            return datasets.load_dataset(path, streaming=True, **options).with_format("arrow")
    except StopIteration as error:  # how the JSON reader says that every file is empty
        raise ConfigError(f"{description}: holds no document") from error
    except Exception as error:
        raise ConfigError(f"{description}: cannot be opened: {type(error).__name__}: {error}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, and no request to the hub's download counter, which is made (and waited for, where there is
    no network) even for local files."""
    bars_enabled, counts = not datasets.are_progress_bars_disabled(), datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.disable_progress_bars()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        if bars_enabled:
            datasets.enable_progress_bars()


def _missing_column(column: str, where: str, columns: Sequence[str]) -> str:
    return f"data.text_column={column!r}: not in {where!r}; columns are {', '.join(columns) or 'none'}"
