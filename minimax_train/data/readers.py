"""The rows of one file, or of a part of it: text, JSON, Parquet, Arrow, or a streaming data set of ``datasets``.

Only the columns of the text are read: what others hold, and whether it changes, does not matter. A row is a number from
0 in its part of the file, which a saved position means; where the next row begins, if a reader can start there; and the
text of the row: null where it has none, :class:`BadDocument` where it has no usable one. What raises instead is a file
that cannot be read on.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import os
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from minimax_train.data.columns import NoText, TextColumns
from minimax_train.errors import ConfigError

# pyarrow is imported where it is used: a trainer that reads in worker processes does without.
if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

_ROWS_PER_READ = 256
_BYTES_PER_READ = 1 << 20
_MOST_COUNTED = 1 << 30  # bytes in which lines are counted for a message: a second
_HEAD = 1 << 22  # bytes by which lines of a compressed file are measured
_SURELY_A_LINE = 1 << 26  # bytes: in which a line is taken to begin, without looking
_GROUPS_PER_SLICE = 16  # of Parquet, from which on slices of whole row groups are about as large as each other
# An integer becomes a float, for a number of 5,000 digits in another column is no error.
_JSON = json.JSONDecoder(parse_int=float)
_BY_EXTENSION = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd", ".zip": "zip"}
_BY_HEAD = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bz2",
    b"\xfd7zXZ\0": "xz",
    b"(\xb5/\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"PK\x05\x06": "zip",
}
_ARROW_FILE = b"ARROW1"


class Part(NamedTuple):
    """Of a file, bytes of JSON lines or rows of others: from ``begin`` to before ``end``; None for the file's end.

    A line belongs to the part in which its first byte lies.
    """

    begin: int
    end: int | None


WHOLE = Part(0, None)


@dataclass(frozen=True)
class BadDocument:
    """A row whose text cannot be used, and why.

    Attributes:
        file: its name.
        unit: what is counted in the file: ``line``, ``row`` or ``item``.
        number: of the row, counted from 1 where ``counted_from`` is.
        reason: what is wrong with it.
        counted_from: a byte of the file. The lines before it are counted when somebody asks for them.
    """

    file: str
    unit: str
    number: int
    reason: str
    counted_from: int = 0

    def __str__(self) -> str:
        number, behind = self.number, ""
        if 0 < self.counted_from <= _MOST_COUNTED and os.path.exists(self.file):
            number += _count_lines(self.file, self.counted_from)
        elif self.counted_from:
            behind = f" from byte {self.counted_from} on"
        return f"{self.file!r}, {self.unit} {number}{behind}: {self.reason}"


Text = str | BadDocument | None
Row = tuple[int, int, Text]


def read_text(path: str, columns: TextColumns, start_row: int, offset: int, part: Part) -> Iterator[Row]:
    """One row: the whole file. A byte that is not UTF-8 becomes U+FFFD, any line end a newline."""
    for row, (_, file, _) in enumerate(_open(path)):
        if row >= start_row:
            text = file.read().decode("utf-8-sig", errors="replace")
            yield row, 0, text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: str, columns: TextColumns, start_row: int, offset: int, part: Part) -> Iterator[Row]:
    """The objects of JSON lines, blank lines left out, or the objects or strings of one JSON list."""
    row = 0
    for name, file, is_plain in _open(path):
        counted_from = offset if is_plain and offset else max(part.begin - 1, 0)
        if counted_from:
            file.seek(counted_from)
        numbered = enumerate(_lines(file, counted_from), 1)
        if is_plain and offset:
            row = start_row
        elif part.begin:
            next(numbered)  # begins before
        lines = ((number, begin, line) for number, (begin, line) in numbered if line and not line.isspace())
        if not counted_from:
            first = next(lines, None)
            if first is None:
                continue
            if first[2].lstrip().startswith(b"["):
                items = _load_list(b"".join([first[2], *(line for _, _, line in lines)]))
                for number, item in enumerate(items, 1):
                    if row >= start_row:
                        item = {columns.names[0]: item} if isinstance(item, str) and len(columns.names) == 1 else item
                        text = _text_of(item, columns)
                        yield row, 0, BadDocument(name, "item", number, str(text)) if isinstance(text, NoText) else text
                    row += 1
                continue
            lines = chain([first], lines)
        for number, begin, line in lines:
            if part.end is not None and begin >= part.end:
                return
            if row >= start_row:
                text = _text_on_line(line, columns)
                found = BadDocument(name, "line", number, str(text), counted_from) if isinstance(text, NoText) else text
                yield row, begin + len(line) if is_plain else 0, found
            row += 1


def read_parquet(path: str, columns: TextColumns, start_row: int, offset: int, part: Part) -> Iterator[Row]:
    """The rows of a Parquet file; row groups before ``start_row`` are not read."""
    import pyarrow.parquet as pq

    with open_raw(path) as opened:
        file, row = pq.ParquetFile(opened), 0
        for name in columns.names:
            _check_column(columns, name, path, file.schema_arrow)
        first, end = part.begin + start_row, file.metadata.num_rows if part.end is None else part.end
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row < end and row + rows > first:
                batches = file.iter_batches(_ROWS_PER_READ, row_groups=[group], columns=list(columns.names))
                yield from _from_batches(batches, path, columns, row, Part(first, end), part.begin)
            row += rows


def read_arrow(path: str, columns: TextColumns, start_row: int, offset: int, part: Part) -> Iterator[Row]:
    """The rows of an Arrow IPC file or stream, as ``datasets`` saves it; record batches before are not decoded."""
    with _arrow_batches(path) as batches:
        yield from _from_batches(batches, path, columns, 0, Part(part.begin + start_row, part.end), part.begin)


def read_shard(shard: datasets.IterableDataset, name: str, columns: TextColumns, start_row: int) -> Iterator[Row]:
    """The rows of one shard of a streaming data set in Arrow format."""
    return _from_batches(shard.iter(batch_size=_ROWS_PER_READ), name, columns, 0, Part(start_row, None), 0)


def line_size(path: str) -> float | None:
    """Bytes of a file of JSON lines, as it is compressed, that a line takes, by its head. None for a zip archive."""
    with open(path, "rb") as raw:
        compression = _compression(path, raw)
        if compression == "zip":
            return None
        head = _decompressed(raw, compression).read(_HEAD)
        return raw.tell() / max(1, head.count(b"\n"))


def cut_json(path: str, slices: int, smallest: int) -> list[int] | None:
    """Bytes at which JSON lines are cut into slices, the file's begin and end among them.

    None where the file cannot be cut: it is not on this machine, compressed or one JSON list, or a slice would have
    fewer than ``smallest`` bytes or no line.
    """
    size = os.path.getsize(path) if os.path.isfile(path) else 0
    if size < slices * smallest or size < slices:
        return None
    with open(path, "rb") as file:
        if _compression(path, file):
            return None
        while (line := file.readline(_BYTES_PER_READ)) and not line.removeprefix(codecs.BOM_UTF8).strip():
            pass
        if line.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            return None
        edges = cut_evenly(size, slices)
        for begin, end in pairwise(edges[1:] if size // slices < _SURELY_A_LINE else ()):
            file.seek(begin - 1)
            if not file.readline(end - begin).endswith(b"\n"):
                return None
    return edges


def cut_parquet(path: str, slices: int, smallest: int) -> list[int] | None:
    """Rows at which a file is cut into slices of at least ``smallest`` rows, between row groups if there are many."""
    if not os.path.isfile(path):
        return None
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(path)
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    bounds = [0]
    for rows in groups:
        bounds.append(bounds[-1] + rows)
    edges = cut_evenly(metadata.num_rows, slices)
    if len(groups) >= _GROUPS_PER_SLICE * slices:
        edges = [bounds[len(groups) * i // slices] for i in range(slices + 1)]
    return edges if _least(edges) >= max(smallest, 1) else None


def cut_arrow(path: str, slices: int, smallest: int) -> list[int] | None:
    """The same of an Arrow file, at any row."""
    if not os.path.isfile(path):
        return None
    with _arrow_batches(path) as batches:
        edges = cut_evenly(sum(len(batch) for batch in batches), slices)
    return edges if _least(edges) >= max(smallest, 1) else None


def cut_evenly(size: int, slices: int) -> list[int]:
    """Where bytes or rows are cut into slices, begin and end among them."""
    return [size * i // slices for i in range(slices + 1)]


def _least(edges: list[int]) -> int:
    return min(b - a for a, b in pairwise(edges))


def _open(path: str) -> Iterator[tuple[str, IO[bytes], bool]]:
    """The file, decompressed, or the files in a zip archive, by name; and whether it can be sought in."""
    with open_raw(path) as raw:
        compression = _compression(path, raw)
        if compression == "zip":
            with zipfile.ZipFile(raw) as archive:
                for member in sorted(archive.namelist(), key=_walked):
                    if not any(part.startswith((".", "__")) for part in member.split("/")) and member[-1] != "/":
                        with archive.open(member) as file:
                            yield f"zip://{member}::{path}", file, False
        else:
            yield path, _decompressed(raw, compression), compression is None


def open_raw(path: str) -> IO[bytes]:
    if os.path.isfile(path):
        return open(path, "rb")
    from datasets.utils.file_utils import xopen  # takes a second or two to import, and local files do not need it

    return xopen(path, "rb")


def _compression(path: str, file: IO[bytes]) -> str | None:
    """By the file's name, or else by how it begins."""
    head = file.read(6)
    file.seek(0)
    found = _BY_EXTENSION.get(os.path.splitext(path)[1])
    if found is None:
        return next((name for begin, name in _BY_HEAD.items() if head.startswith(begin)), None)
    if not head:
        raise EOFError("an empty file, which is not even the beginning of a compressed one")
    return found


def _decompressed(raw: IO[bytes], compression: str | None) -> IO[bytes]:
    if compression == "gzip":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if compression == "bz2":
        return bz2.BZ2File(raw)
    if compression == "xz":
        return lzma.LZMAFile(raw)
    if compression == "zstd":
        import pyarrow as pa

        return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
    return raw


def _walked(member: str) -> list[tuple[bool, str]]:
    """Sorts files of a folder by name before its folders."""
    *folders, name = member.split("/")
    return [*((True, folder) for folder in folders), (False, name)]


def _lines(file: IO[bytes], at: int) -> Iterator[tuple[int, bytes]]:
    """From the byte ``at`` on, where the file stands: where each line begins, and it with its end.

    By large reads, which ``datasets`` repeats where a connection breaks.
    """
    parts = []
    while chunk := file.read(_BYTES_PER_READ):
        if at == 0 and not parts and chunk.startswith(codecs.BOM_UTF8):
            chunk = b" " * len(codecs.BOM_UTF8) + chunk[len(codecs.BOM_UTF8) :]
        *ended, rest = chunk.split(b"\n")
        for line in ended:
            line = b"".join([*parts, line, b"\n"])
            yield at, line
            at += len(line)
            parts = []
        parts.append(rest)
    yield at, b"".join(parts)


def _count_lines(path: str, end: int) -> int:
    count = 0
    with open(path, "rb") as file:
        while end > 0 and (chunk := file.read(min(_BYTES_PER_READ, end))):
            count, end = count + chunk.count(b"\n"), end - len(chunk)
    return count


def _load_list(content: bytes) -> list[Any]:
    try:
        return _JSON.decode(content.decode())
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"one JSON list: line {line}: byte 0x{content[error.start]:02x} is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not one JSON list: {error}") from error


def _text_on_line(line: bytes, columns: TextColumns) -> str | NoText | None:
    try:
        item = _JSON.decode(line.rstrip().decode())
    except UnicodeDecodeError as error:
        return NoText(f"byte {error.start + 1} of the line, 0x{line[error.start]:02x}, is not UTF-8")
    except json.JSONDecodeError as error:
        reason = error.msg.removesuffix(" at")
        return NoText(f"must be one JSON object: {reason} at character {error.pos + 1}")
    except RecursionError:
        return NoText("must be one JSON object: nested too deeply")
    return _text_of(item, columns)


def _text_of(item: Any, columns: TextColumns) -> str | NoText | None:
    try:
        text = columns.text(item)
    except NoText as error:
        return error
    if text is not None and not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return NoText(f"holds half a surrogate pair, \\u{ord(text[error.start]):04x}, which is no text")
    return text


@contextmanager
def _arrow_batches(path: str) -> Iterator[Iterator[pa.RecordBatch]]:
    import pyarrow as pa

    is_local = os.path.isfile(path)
    with pa.memory_map(path) if is_local else pa.PythonFile(open_raw(path), mode="r") as file:
        is_file = file.read(len(_ARROW_FILE)) == _ARROW_FILE
        file.seek(0)
        if is_file:
            reader = pa.ipc.open_file(file)
            yield (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            yield iter(pa.ipc.open_stream(file))


def _from_batches(
    batches: Iterable[Any], name: str, columns: TextColumns, row: int, part: Part, base: int
) -> Iterator[Row]:
    """The rows of ``part`` of batches that begin at ``row``, numbered from ``base`` on."""
    for batch in batches:
        if part.end is not None and row >= part.end:
            return
        first, count = max(part.begin - row, 0), len(batch)
        if part.end is not None:
            count = min(count, part.end - row)
        if first < count:
            found = [_values(_column(batch, name, columns, column), first, count) for column in columns.names]
            for i, values in enumerate(zip(*found, strict=True), row + first):
                wrong = next((value for value in values if isinstance(value, UnicodeDecodeError)), None)
                if wrong is not None:
                    yield i - base, 0, BadDocument(name, "row", i + 1, f"not UTF-8: {wrong.reason}")
                else:
                    yield i - base, 0, columns.fill(values)
        row += len(batch)


def _values(texts: Any, first: int, end: int) -> list[Any]:
    texts = texts.slice(first, end - first)
    try:
        return texts.to_pylist()
    except UnicodeDecodeError:
        return [_value(text) for text in texts]


def _value(text: pa.Scalar) -> str | UnicodeDecodeError | None:
    try:
        return text.as_py()
    except UnicodeDecodeError as error:
        return error


def _column(batch: Any, where: str, columns: TextColumns, name: str) -> Any:
    """A column of exactly that name, or what dots lead to, as text."""
    import pyarrow as pa
    import pyarrow.compute

    found: Any = None
    for index in _check_column(columns, name, where, batch.schema):
        if found is None:
            found = batch.column(index)
        else:
            found = pa.compute.call_function("struct_field", [found], pa.compute.StructFieldOptions([index]))
    return found.cast(found.type.value_type) if pa.types.is_dictionary(found.type) else found


def _check_column(columns: TextColumns, name: str, where: str, schema: pa.Schema) -> list[int]:
    """Indices of a column and of the fields in it.

    Raises:
        ConfigError: when there is none, or it holds no text.
    """
    import pyarrow as pa

    try:
        path, kind = _find(list(schema), name)
    except KeyError:
        shown = ", ".join(schema.names) or "none"
        raise ConfigError(f"{columns.of_column(name)}: not in {where!r}; columns are {shown}") from None
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    if not any(is_kind(kind) for is_kind in is_text):
        raise ConfigError(f"{columns.of_column(name)}: holds {kind} in {where!r}, must hold text")
    return path


def _find(fields: list[pa.Field], name: str) -> tuple[list[int], pa.DataType]:
    import pyarrow as pa

    names = [field.name for field in fields]
    if name in names:
        return [names.index(name)], fields[names.index(name)].type
    outer, dot, inner = name.partition(".")
    if not dot or outer not in names or not pa.types.is_struct(kind := fields[names.index(outer)].type):
        raise KeyError(name)
    path, found = _find([kind.field(i) for i in range(kind.num_fields)], inner)
    return [names.index(outer), *path], found
