"""A split of a data set: named shards (files), the documents of each by row, and what tells its content from another's.

The position of a reader is (shard, row), kept here. The iterator state of ``datasets`` is not used: it has lost or
repeated rows in several releases (huggingface/datasets#7538, #8145, #8308), and it cannot say which file is corrupt.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from gzip import BadGzipFile
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minimax_train.data import readers
from minimax_train.data.columns import TextColumns
from minimax_train.data.config import MEGATRON, SKIP, DataConfig, SourceConfig
from minimax_train.data.files import digest, match_files, stdlib_files
from minimax_train.data.readers import WHOLE, BadDocument, Part, Row
from minimax_train.data.shuffle import stable_hash
from minimax_train.data.token_files import TokenFile, bin_files, index_of, read_about
from minimax_train.errors import ConfigError, one_line
from minimax_train.metrics.console import note

if TYPE_CHECKING:
    import datasets

    from minimax_train.data.tokenizer import Tokenizer

TRAIN, VALIDATION = "train", "validation"
_ALL_BAD = 1000  # bad documents at the start of a file, and no other: a wrong setting rather than some bad documents
_SMALLEST_BYTES, _SMALLEST_ROWS = 1 << 16, 64  # of a slice; reading less than this in every stream is no matter
_SLICES_PER_STREAM = 16  # so that no stream gets a sixteenth more than another, however many files there are
_RETRIES, _FIRST_WAIT_S = 5, 1.0
_NETWORK_LIBRARIES = {"aiohttp", "botocore", "httpcore", "httpx", "huggingface_hub", "requests", "urllib3"}
_NOT_FOR_NOW = (BadGzipFile, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class Document(NamedTuple):
    """What was read of a shard.

    Attributes:
        row: its number in the shard.
        following: the byte of the file where the next row begins, of JSON lines that are not compressed; 0 of others.
        content: its text, or its tokens (int64, the end of text included).
    """

    row: int
    following: int
    content: str | np.ndarray | BadDocument


@dataclass(frozen=True)
class Source:
    """One split of a data set. It holds no open file and may be sent to another process.

    Files and shards: a *file* is what the configuration names (or what the hub's loader makes of one); digests, and
    "files were added at the end", are per file. A *shard* is what :meth:`read` reads: a file, or one of the slices
    that :meth:`split` cuts it into. Without slices the two are the same.

    Attributes:
        description: the configuration field it comes from, for messages.
        files: a name for each file.
        format: how files are read; None for those that ``dataset`` reads.
        columns: where the text is in a row.
        skips_bad: whether a bad document is passed over; it is an error otherwise.
        identity: what the documents depend on besides the shards' content, by configuration field.
        fingerprint: of names and sizes alone: what saved positions of earlier versions hold.
        dataset: the streaming data set in Arrow format, of formats that only ``datasets`` reads.
        edges: of each file, where it is cut into slices (bytes or rows, its begin and its end included); None for
            files that are not cut. All files have as many slices.
        ids: of tokens, the one that ends a document, and how many there are; None before :meth:`with_tokenizer`.
    """

    description: str
    files: Sequence[str]
    format: str | None
    columns: TextColumns
    skips_bad: bool
    identity: Mapping[str, str | None]
    fingerprint: str
    dataset: datasets.IterableDataset | None = None
    edges: Sequence[Sequence[int]] | None = None
    ids: tuple[int, int] | None = None

    @cached_property
    def shards(self) -> Sequence[str]:
        """A name for each shard: the file's, and which slice of it."""
        if self.edges is None:
            return self.files
        slices = len(self.edges[0]) - 1
        return [f"{file} (part {i + 1} of {slices})" for file in self.files for i in range(slices)]

    @property
    def is_tokens(self) -> bool:
        """Whether ``Document.content`` is tokens (int64, the end of text included) rather than text."""
        return self.format == MEGATRON

    def with_tokenizer(self, tokenizer: Tokenizer) -> Source:
        """The source, ready to be read with this tokenizer. Sources of text are returned as they are.

        Of a source of tokens :meth:`read` then ends each document in ``tokenizer.eos_id`` and refuses ids at or above
        ``tokenizer.vocab_size``.

        Raises:
            ConfigError: when the token files say that another tokenizer made them.
        """
        if not self.is_tokens:
            return self
        for file in self.files:
            with self._named(file):
                about = read_about(file)
            made_by = about.get("tokenizer", tokenizer.fingerprint)
            if made_by != tokenizer.fingerprint:
                raise ConfigError(
                    f"{self.description}: {file!r} was made with another tokenizer, of {about.get('vocab_size')} ids "
                    f"(fingerprint {made_by}); data.tokenizer has {tokenizer.vocab_size} ids (fingerprint "
                    f"{tokenizer.fingerprint}), and must be the one that it was made with"
                )
        return replace(self, ids=(tokenizer.eos_id, tokenizer.vocab_size))

    def split(self, num_streams: int, num_files: int | None = None) -> Source:
        """The source cut into shards so that each of ``num_streams`` streams reads only its own.

        With fewer files than streams, each file is cut into slices, as many of each: JSON lines by bytes (a line
        belongs to the slice in which its first byte lies), Parquet and Arrow by rows, tokens by documents. Up to 16
        files are cut into ``num_streams`` slices each, so that the shards s, s + num_streams, ... are one slice of each
        file; more files into fewer. With as many files as streams, or where a file cannot be cut (compressed, not on
        this machine, text, one JSON list, or so small that a slice may hold no document), the shards stay the files.
        The cut depends on ``num_streams``, ``num_files`` and those files alone.

        Args:
            num_files: take the first of the files only, as an epoch did that began before files were added at the end;
                all of them if None.

        Raises:
            ConfigError: naming a file that cannot be read.
        """
        whole = replace(self, files=self.files[:num_files], edges=None)
        count = len(whole.files)
        if not 0 < count < num_streams or self.dataset is not None:
            return whole
        slices = min(num_streams, -(-_SLICES_PER_STREAM * num_streams // count))
        edges = []
        for file in whole.files:
            with self._named(file):
                found = self._cut(file, slices)
            if found is None:
                return whole
            edges.append(found)
        return replace(whole, edges=edges)

    def read(self, shard: int, start_row: int = 0, offset: int = 0) -> Iterator[Document]:
        """A shard's documents from ``start_row`` on; null and empty texts are passed over.

        Where bad documents are passed over they come as such, for who counts them. A file system or a connection that
        fails is tried again for a while, which is said on stderr, and reading goes on at the row where it stood.

        Args:
            offset: ``following`` of the document before, with which ``start_row`` is found without reading what is
                before it; 0 where it is not known.

        Raises:
            ConfigError: naming the field, the shard, and line or row: when it cannot be read or has no such column of
                text, or holds a bad document.
        """
        name, rows = self.shards[shard], self._rows(shard, start_row, offset)
        following, bad, failures = start_row, 0, 0
        while True:
            try:
                found = next(rows, None)
            except ConfigError:
                raise
            except Exception as error:
                reached = f" beyond row {following}" if following else ""
                failures += 1
                if failures <= _RETRIES and self._may_pass(error):
                    wait = _FIRST_WAIT_S * 2 ** (failures - 1)
                    note(f"{name!r}: cannot be read{reached} ({one_line(error)}); tried again in {wait:g} s")
                    time.sleep(wait)
                    rows = self._rows(shard, following, offset)
                    continue
                tried = f", tried {failures} times" if failures > 1 else ""
                message = f"{self.description}: cannot read {name!r}{reached}{tried}: {_reason(error)}"
                raise ConfigError(message) from error
            if found is None:
                return
            row, offset, content = found
            following, failures = row + 1, 0
            if isinstance(content, BadDocument):
                bad += 1
                if not self.skips_bad:
                    raise ConfigError(f"{self.description}: {content}; data.bad_documents={SKIP} would pass over it")
                if following == bad == _ALL_BAD:
                    raise ConfigError(f"{self.description}: the first {bad} documents are bad, the last: {content}")
                yield Document(row, offset, content)
            elif content is not None and len(content):
                yield Document(row, offset, content)

    def documents(self) -> Iterator[str]:
        """The text of every document once, shard by shard, in the order of the shards."""
        found = chain.from_iterable(self.read(shard) for shard in range(len(self.shards)))
        return (document.content for document in found if isinstance(document.content, str))

    def digests(self) -> list[str]:
        """One per file, which changes with a file's size, head or tail; of a remote file, with its name."""
        try:
            with ThreadPoolExecutor(16) as pool:  # network file systems answer late, but many at a time
                found = list(pool.map(digest, self.files))
                if self.is_tokens:
                    indices = pool.map(digest, map(index_of, self.files))
                    found = [tokens + index for tokens, index in zip(found, indices, strict=True)]
                return found
        except OSError as error:
            raise ConfigError(f"{self.description}: cannot read {error.filename!r}: {error.strerror}") from error

    def _rows(self, shard: int, start_row: int, offset: int) -> Iterator[Row | tuple[int, int, np.ndarray]]:
        file, part = shard, WHOLE
        if self.edges is not None:
            file, i = divmod(shard, len(self.edges[0]) - 1)
            part = Part(self.edges[file][i], self.edges[file][i + 1])
        name = self.files[file]
        if self.is_tokens:
            assert self.ids is not None, "with_tokenizer comes first"
            found = TokenFile(name).read(part, start_row, *self.ids)
            return ((row, 0, tokens) for row, tokens in found)
        if self.format is not None:
            return _reader(self.format)(name, self.columns, start_row, offset, part)
        assert self.dataset is not None
        from minimax_train.data import tables

        one_shard = self.dataset.shard(num_shards=self.dataset.num_shards, index=shard, contiguous=False)
        return tables.read_shard(one_shard, name, self.columns, start_row)

    def _cut(self, file: str, slices: int) -> list[int] | None:
        if self.format == "json":
            return readers.cut_json(file, slices, _SMALLEST_BYTES)
        if self.format in ("parquet", "arrow"):
            from minimax_train.data import tables

            cut = tables.cut_parquet if self.format == "parquet" else tables.cut_arrow
            return cut(file, slices, _SMALLEST_ROWS)
        if self.is_tokens and (rows := TokenFile(file).num_documents) >= slices * max(_SMALLEST_ROWS, 1):
            return readers.cut_evenly(rows, slices)
        return None

    @contextmanager
    def _named(self, file: str) -> Iterator[None]:
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"{self.description}: cannot read {file!r}: {_reason(error)}") from error

    def _may_pass(self, error: Exception) -> bool:
        """Whether reading again may help: not of what a file holds."""
        if type(error).__module__.partition(".")[0] in _NETWORK_LIBRARIES:
            return True
        if not isinstance(error, OSError) or isinstance(error, _NOT_FOR_NOW):
            return False
        # Decoders raise a plain OSError without a number for what they cannot decode.
        return type(error) is not OSError or error.errno is not None


def _reader(file_format: str) -> Callable[[str, TextColumns, int, int, Part], Iterator[Row]]:
    if file_format in ("text", "json"):
        return readers.read_text if file_format == "text" else readers.read_json
    from minimax_train.data import tables  # imports pyarrow

    return {"parquet": tables.read_parquet, "arrow": tables.read_arrow}[file_format]


def _reason(error: Exception) -> str:
    reason = (str(error).splitlines() or [""])[0]
    return reason if type(error) is ValueError else f"{type(error).__name__}: {reason}"


def open_sources(config: DataConfig, split: str) -> dict[str, Source]:
    """All configured sources by name; of ``validation`` those that have files or a split of their own for it.

    Raises:
        ConfigError: as :func:`open_source`.
    """
    return {
        name: open_source(
            source,
            split,
            path=f"data.sources.{name}" if config.sources else "data",
            bad_documents=config.bad_documents,
        )
        for name, source in config.named_sources.items()
        if split == TRAIN or source.has_validation_files
    }


def open_source(source: SourceConfig, split: str, *, path: str, bad_documents: str) -> Source:
    """Opens the ``train`` or ``validation`` part of a data set, without reading its documents.

    Args:
        path: dotted, of the group that configures the source, for messages: ``data`` or ``data.sources.web``.
        bad_documents: ``data.bad_documents``.

    Raises:
        ConfigError: naming the field and its value, when files are missing or unreadable, or the data set or split does
            not exist.
    """
    if split == VALIDATION and not source.has_validation_files:
        field = "validation_files=[]" if source.source == "files" else "validation_split=None"
        raise ConfigError(f"{path}.{field}: evaluation needs held-out documents; name some or switch evaluation off")
    skips_bad = bad_documents == SKIP
    if source.source == "hub":
        return _open_hub(source, split, path, skips_bad)
    if source.source == "stdlib":
        files = stdlib_files(f"{path}.source", held_out=split == VALIDATION)
        return _open_files(source, f"{path}.source='stdlib'", files, path, skips_bad)
    field = f"{split}_files"
    patterns = list(getattr(source, field))
    shown = f"[{', '.join(map(repr, patterns[:3]))}{', ...' if len(patterns) > 3 else ''}]"
    files = match_files(f"{path}.{field}", patterns)
    if source.format == MEGATRON:
        files = bin_files(f"{path}.{field}", files)
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda file: _check_tokens(f"{path}.{field}", file), files))
    return _open_files(source, f"{path}.{field}={shown}", files, path, skips_bad)


def _open_files(config: SourceConfig, description: str, files: list[str], path: str, skips_bad: bool) -> Source:
    sizes = ((os.path.basename(file), os.path.getsize(file)) for file in files)
    return Source(
        description,
        files,
        config.format,
        TextColumns.of(path, config.text_column, config.template),
        skips_bad,
        identity={f"{path}.format": config.format, **_columns_identity(config, path)},
        fingerprint=f"{stable_hash(*chain.from_iterable(sizes)):016x}",
    )


def _check_tokens(field: str, file: str) -> None:
    try:
        TokenFile(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{field}: {file!r}: {_reason(error)}") from error


def _columns_identity(config: SourceConfig, path: str) -> dict[str, str | None]:
    return {f"{path}.text_column": config.text_column, f"{path}.template": config.template}


def _open_hub(config: SourceConfig, part: str, path: str, skips_bad: bool) -> Source:
    import datasets  # takes a second or two, and files on this machine do not need it
    from datasets.packaged_modules.json.json import Json
    from datasets.packaged_modules.parquet.parquet import Parquet

    field = f"{part}_split"
    split = getattr(config, field)
    assert config.name is not None
    description = f"{path}.name={config.name!r} (subset {config.subset!r}, split {split!r})"
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
    named = {f"{path}.name": config.name, f"{path}.subset": config.subset, f"{path}.revision": config.revision}
    named[f"{path}.{field}"] = split
    return Source(
        description,
        shards,
        file_format,
        TextColumns.of(path, config.text_column, config.template),
        skips_bad,
        identity={**named, **_columns_identity(config, path)},
        fingerprint=f"{stable_hash(*named.values(), len(shards)):016x}",
        dataset=dataset,
    )


@contextmanager
def _opening(description: str) -> Iterator[None]:
    """Without progress bars, and without a request to the hub's download counter, which is made (and waited for, where
    there is no network) even for local files. What goes wrong becomes an error of the configuration."""
    import datasets

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
