"""A split of a data set: named shards (files), the documents of each by row, and what tells its content from another's.

The position of a reader is (shard, row), kept here. The iterator state of ``datasets`` is not used: it has lost or
repeated rows in several releases (huggingface/datasets#7538, #8145, #8308), and it cannot say which file is corrupt.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import datasets
import numpy as np
from datasets.packaged_modules.json.json import Json
from datasets.packaged_modules.parquet.parquet import Parquet

from minimax_train.data.config import SKIP, DataConfig
from minimax_train.data.files import digest, match_files, stdlib_files
from minimax_train.data.readers import BadDocument, Row, read_json, read_parquet, read_shard, read_text
from minimax_train.data.shuffle import stable_hash
from minimax_train.errors import ConfigError

TRAIN, VALIDATION = "train", "validation"
_READERS = {"text": read_text, "json": read_json, "parquet": read_parquet}
_ALL_BAD = 1000  # bad documents at the start of a file, and no other: a wrong setting rather than some bad documents


class Document(NamedTuple):
    """What was read of a shard.

    Attributes:
        row: its number in the shard.
        following: where the next row begins, for readers that can start there, such as a byte; 0 for others.
        content: its text, or its tokens (int64, the end of text included).
    """

    row: int
    following: int
    content: str | np.ndarray | BadDocument


@dataclass(frozen=True)
class Source:
    """One split of a data set. It holds no open file and may be sent to another process.

    Attributes:
        description: the configuration field it comes from, for messages.
        shards: a name for each shard; a shard is a file, or what the hub's loader makes of one.
        format: how files are read; None for those that ``dataset`` reads.
        text_column: the column that holds the text.
        skips_bad: whether a bad document is passed over; it is an error otherwise.
        identity: what the documents depend on besides the shards' content, by configuration field.
        fingerprint: of names and sizes alone: what saved positions of earlier versions hold.
        dataset: the streaming data set in Arrow format, of formats that only ``datasets`` reads.
    """

    description: str
    shards: Sequence[str]
    format: str | None
    text_column: str
    skips_bad: bool
    identity: Mapping[str, str | None]
    fingerprint: str
    dataset: datasets.IterableDataset | None = None

    def read(self, shard: int, start_row: int = 0, offset: int = 0) -> Iterator[Document]:
        """A shard's documents from ``start_row`` on; null and empty texts are passed over.

        Where bad documents are passed over they come as such, for who counts them.

        Args:
            offset: of the document before, with which ``start_row`` is found without reading what is before it; 0 where
                it is not known.

        Raises:
            ConfigError: naming the field, the shard, and line or row: when it cannot be read or has no such column of
                text, or holds a bad document.
        """
        name, rows = self.shards[shard], self._rows(shard, start_row)
        following, bad = start_row, 0
        while True:
            try:
                found = next(rows, None)
            except ConfigError:
                raise
            except Exception as error:
                reached = f" beyond row {following}" if following else ""
                reason = (str(error).splitlines() or [""])[0]
                message = f"{self.description}: cannot read {name!r}{reached}: {type(error).__name__}: {reason}"
                raise ConfigError(message) from error
            if found is None:
                return
            row, text = found
            following = row + 1
            if isinstance(text, BadDocument):
                bad += 1
                if not self.skips_bad:
                    raise ConfigError(f"{self.description}: {text}; data.bad_documents={SKIP} would pass over it")
                if following == bad == _ALL_BAD:
                    raise ConfigError(f"{self.description}: the first {bad} documents are bad, the last: {text}")
                yield Document(row, 0, text)
            elif text:
                yield Document(row, 0, text)

    def documents(self) -> Iterator[str]:
        """The text of every document once, shard by shard, in the order of the shards."""
        found = chain.from_iterable(self.read(shard) for shard in range(len(self.shards)))
        return (document.content for document in found if isinstance(document.content, str))

    def digests(self) -> list[str]:
        """One per shard, which changes with a file's size, head or tail; of a remote file, with its name."""
        try:
            with ThreadPoolExecutor(16) as pool:  # network file systems answer late, but many at a time
                return list(pool.map(digest, self.shards))
        except OSError as error:
            raise ConfigError(f"{self.description}: cannot read {error.filename!r}: {error.strerror}") from error

    def _rows(self, shard: int, start_row: int) -> Iterator[Row]:
        name = self.shards[shard]
        if self.format is not None:
            return _READERS[self.format](name, self.text_column, start_row)
        assert self.dataset is not None
        one_shard = self.dataset.shard(num_shards=len(self.shards), index=shard, contiguous=False)
        return read_shard(one_shard, name, self.text_column, start_row)


def open_source(config: DataConfig, split: str) -> Source:
    """Opens the ``train`` or ``validation`` part of the configured data set, without reading its documents.

    Raises:
        ConfigError: naming the field and its value, when files are missing or unreadable, or the data set or split does
            not exist.
    """
    if split == VALIDATION and not config.has_validation:
        field = "validation_files=[]" if config.source == "files" else "validation_split=None"
        raise ConfigError(f"data.{field}: evaluation needs held-out documents; name some or switch evaluation off")
    if config.source == "hub":
        return _open_hub(config, split)
    if config.source == "stdlib":
        return _open_files(config, "data.source='stdlib'", stdlib_files(held_out=split == VALIDATION))
    field = f"{split}_files"
    patterns = list(getattr(config, field))
    shown = f"[{', '.join(map(repr, patterns[:3]))}{', ...' if len(patterns) > 3 else ''}]"
    return _open_files(config, f"data.{field}={shown}", match_files(field, patterns))


def _open_files(config: DataConfig, description: str, files: list[str]) -> Source:
    sizes = ((os.path.basename(file), os.path.getsize(file)) for file in files)
    return Source(
        description,
        files,
        config.format,
        config.text_column,
        config.bad_documents == SKIP,
        identity={"data.format": config.format, "data.text_column": config.text_column},
        fingerprint=f"{stable_hash(*chain.from_iterable(sizes)):016x}",
    )


def _open_hub(config: DataConfig, part: str) -> Source:
    field = f"{part}_split"
    split = getattr(config, field)
    assert config.name is not None
    description = f"data.name={config.name!r} (subset {config.subset!r}, split {split!r})"
    with _opening(description):
        builder = datasets.load_dataset_builder(config.name, name=config.subset, revision=config.revision)
    settings: Any = builder.config
    shards, file_format, dataset = list((settings.data_files or {}).get(split, [])), None, None
    if shards and isinstance(builder, Json) and settings.field is None and settings.encoding == "utf-8":
        file_format = "json"
    elif shards and isinstance(builder, Parquet) and settings.filters is None:
        file_format = "parquet"
    else:
        with _opening(description):
            opened: Any = builder.as_streaming_dataset(split=split)
            dataset = opened.with_format("arrow")
        shards = [f"{config.name} {split} shard {i}" for i in range(dataset.num_shards)]
    named = {"data.name": config.name, "data.subset": config.subset, "data.revision": config.revision}
    named[f"data.{field}"] = split
    return Source(
        description,
        shards,
        file_format,
        config.text_column,
        config.bad_documents == SKIP,
        identity={**named, "data.text_column": config.text_column},
        fingerprint=f"{stable_hash(*named.values(), len(shards)):016x}",
        dataset=dataset,
    )


@contextmanager
def _opening(description: str) -> Iterator[None]:
    """Without progress bars, and without a request to the hub's download counter, which is made (and waited for, where
    there is no network) even for local files. What goes wrong becomes an error of the configuration."""
    bars_enabled, counts = not datasets.are_progress_bars_disabled(), datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.disable_progress_bars()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"{description}: cannot be opened: {type(error).__name__}: {reason}") from error
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        if bars_enabled:
            datasets.enable_progress_bars()
