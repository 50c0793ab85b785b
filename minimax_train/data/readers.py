"""The rows of one file or shard: text, JSON, Parquet, or a streaming data set of ``datasets``.

Only the text is read: what other columns hold, and whether it changes, does not matter. A row is a number from 0, which
a saved position means, and the text of the row: null where it has none, :class:`BadDocument` where it has no usable
one. What raises instead is a file that cannot be read on.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import IO, Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.utils.file_utils import xopen

from minimax_train.errors import ConfigError

_ROWS_PER_READ = 256
_BYTES_PER_READ = 1 << 20
_JSON_NAMES: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


@dataclass(frozen=True)
class BadDocument:
    """A row whose text cannot be used: ``where`` names file and line, ``reason`` says what is wrong with it."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


Row = tuple[int, str | BadDocument | None]


def read_text(path: str, column: str, start_row: int) -> Iterator[Row]:
    """One row: the whole file. A byte that is not UTF-8 becomes U+FFFD, any line end a newline."""
    for row, (_, file) in enumerate(_open(path)):
        if row >= start_row:
            text = file.read().decode("utf-8-sig", errors="replace")
            yield row, text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: str, column: str, start_row: int) -> Iterator[Row]:
    """The objects of JSON lines, blank lines left out, or the objects or strings of one JSON list."""
    row = 0
    for name, file in _open(path):
        numbered = ((number, line) for number, line in enumerate(_lines(file), 1) if line and not line.isspace())
        first = next(numbered, (0, b""))
        if first[1].lstrip().startswith(b"["):
            items = _load_list(b"".join([first[1], *(line for _, line in numbered)]))
            found = ((f"{name!r}, item {i}", item) for i, item in enumerate(items, 1))
            read = (_text_of(where, {column: item} if isinstance(item, str) else item, column) for where, item in found)
            yield from ((i, text) for i, text in enumerate(read, row) if i >= start_row)
            row += len(items)
        elif first[1]:
            for number, line in chain([first], numbered):
                if row >= start_row:
                    yield row, _text_on_line(f"{name!r}, line {number}", line, column)
                row += 1


def read_parquet(path: str, column: str, start_row: int) -> Iterator[Row]:
    """The rows of a Parquet file; row groups before ``start_row`` are not read."""
    with xopen(path, "rb") as opened:
        file, row = pq.ParquetFile(opened), 0
        _check_column(column, path, file.schema_arrow.names)
        for group in range(file.num_row_groups):
            if row + file.metadata.row_group(group).num_rows > start_row:
                batches = file.iter_batches(_ROWS_PER_READ, row_groups=[group], columns=[column])
                yield from _from_batches(batches, path, column, row, start_row)
            row += file.metadata.row_group(group).num_rows


def read_shard(shard: datasets.IterableDataset, name: str, column: str, start_row: int) -> Iterator[Row]:
    """The rows of one shard of a streaming data set in Arrow format."""
    return _from_batches(shard.iter(batch_size=_ROWS_PER_READ), name, column, 0, start_row)


def _open(path: str) -> Iterator[tuple[str, IO[bytes]]]:
    """The file, decompressed, or the files in a zip archive, by name."""
    manager = datasets.StreamingDownloadManager()
    for member in manager.iter_files(manager.download_and_extract(path)):
        with xopen(member, "rb") as file:
            yield member if member.startswith("zip://") else path, file


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """With their ends. By large reads, which ``datasets`` repeats where a connection breaks."""
    parts, is_first = [], True
    while chunk := file.read(_BYTES_PER_READ):
        if is_first:
            chunk, is_first = chunk.removeprefix(codecs.BOM_UTF8), False
        *ended, rest = chunk.split(b"\n")
        for line in ended:
            yield b"".join([*parts, line, b"\n"])
            parts = []
        parts.append(rest)
    yield b"".join(parts)


def _load_list(content: bytes) -> list[Any]:
    try:
        return json.loads(content.decode(), parse_int=float)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"one JSON list: line {line}: byte 0x{content[error.start]:02x} is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not one JSON list: {error}") from error


def _text_on_line(where: str, line: bytes, column: str) -> str | BadDocument | None:
    try:
        # As a float, for a number of 5,000 digits in another column is no error.
        item = json.loads(line.rstrip().decode(), parse_int=float)
    except UnicodeDecodeError as error:
        return BadDocument(where, f"byte {error.start + 1} of the line, 0x{line[error.start]:02x}, is not UTF-8")
    except json.JSONDecodeError as error:
        reason = error.msg.removesuffix(" at")
        return BadDocument(where, f"must be one JSON object: {reason} at character {error.pos + 1}")
    except RecursionError:
        return BadDocument(where, "must be one JSON object: nested too deeply")
    return _text_of(where, item, column)


def _text_of(where: str, item: Any, column: str) -> str | BadDocument | None:
    if not isinstance(item, dict):
        return BadDocument(where, f"must be one JSON object, not {_JSON_NAMES[type(item)]}")
    if column not in item:
        shown = ", ".join(list(item)[:20])
        return BadDocument(where, f"has no data.text_column={column!r}; columns are {shown or 'none'}")
    text = item[column]
    if text is None:
        return None
    if not isinstance(text, str):
        return BadDocument(where, f"data.text_column={column!r} holds {_JSON_NAMES[type(text)]}, must hold text")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return BadDocument(where, f"holds half a surrogate pair, \\u{ord(text[error.start]):04x}, which is no text")
    return text


def _from_batches(batches: Iterator[Any], name: str, column: str, row: int, start_row: int) -> Iterator[Row]:
    for batch in batches:
        if row + len(batch) > start_row:
            _check_column(column, name, batch.column_names)
            texts = batch.column(column)
            if pa.types.is_dictionary(texts.type):
                texts = texts.cast(texts.type.value_type)
            kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
            if not any(is_kind(texts.type) for is_kind in kinds):
                raise ConfigError(f"data.text_column={column!r}: holds {texts.type} in {name!r}, must hold text")
            first = max(start_row - row, 0)
            for i, text in enumerate(texts.slice(first), row + first):
                try:
                    yield i, text.as_py()
                except UnicodeDecodeError as error:
                    yield i, BadDocument(f"{name!r}, row {i + 1}", f"not UTF-8: {error.reason}")
        row += len(batch)


def _check_column(column: str, where: str, columns: list[str]) -> None:
    if column not in columns:
        raise ConfigError(f"data.text_column={column!r}: not in {where!r}; columns are {', '.join(columns) or 'none'}")
