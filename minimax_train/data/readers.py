"""The rows of one file of text or JSON, or of a part of it; files of columns are in ``tables.py``.

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
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import IO, Any, NamedTuple

from minimax_train.data.columns import NoText, TextColumns

_BYTES_PER_READ = 1 << 20
_MOST_COUNTED = 1 << 30  # bytes in which lines are counted for a message: a second
_HEAD = 1 << 22  # bytes by which lines of a compressed file are measured
_SURELY_A_LINE = 1 << 26  # bytes: in which a line is taken to begin, without looking
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


def cut_evenly(size: int, slices: int) -> list[int]:
    """Where bytes or rows are cut into slices, begin and end among them."""
    return [size * i // slices for i in range(slices + 1)]


def least(edges: list[int]) -> int:
    """Bytes or rows of the smallest slice."""
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
