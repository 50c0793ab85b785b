"""Tokens on disk: ``X.bin`` and ``X.idx`` in the layout of Megatron-Core's IndexedDataset, and ``X.json`` of our own.

``X.bin`` holds the ids of all sequences, one after the other. ``X.idx``, all numbers little-endian:

======================  ================================================================
9 bytes                 ``MMIDIDX``, two zeros
uint64                  version, 1
uint8                   type of the ids, a key of ``_DTYPES``
uint64                  number of sequences, N
uint64                  number of document indices, D + 1
int32 ``[N]``           tokens of each sequence
int64 ``[N]``           the byte of ``X.bin`` where it begins
int64 ``[D + 1]``       the sequence with which each document begins, and N
======================  ================================================================

A document is usually one sequence. ``X.json`` says which tokenizer made the ids.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from minimax_train.data.readers import Part
from minimax_train.errors import ConfigError
from minimax_train.files import UNFINISHED, replace_text

BIN, INDEX, ABOUT = ".bin", ".idx", ".json"
_MAGIC, _VERSION = b"MMIDIDX\0\0", 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
# Megatron-Core's choice: uint16 holds ids up to a vocabulary of 65,500.
_UINT16, _INT32, _MOST_OF_UINT16 = 8, 4, 65_500
_TOGETHER = 1 << 20  # tokens that are read at once, or one document
_DOCUMENTS_TOGETHER = 1 << 14
_COPIED = 1 << 20


class TokenFile:
    """A pair of files, open for reading.

    Attributes:
        num_documents: how many there are.

    Raises:
        ValueError: when the files are not what they should be, or do not belong together.
        OSError: when one cannot be read.
    """

    def __init__(self, path: str) -> None:
        index = index_of(path)
        if not os.path.exists(index):
            raise ValueError(f"has no {os.path.basename(index)!r} beside it")
        size = os.path.getsize(index)
        with open(index, "rb") as file:
            header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise ValueError(f"{os.path.basename(index)!r} is no index of Megatron-Core's: it must begin with MMIDIDX")
        _, version, code, sequences, documents = _HEADER.unpack(header)
        if version != _VERSION:
            raise ValueError(f"{os.path.basename(index)!r} has version {version}, must have {_VERSION}")
        if code not in _DTYPES:
            raise ValueError(f"{os.path.basename(index)!r} holds numbers of type {code}, must be integers")
        expected = _HEADER.size + 12 * sequences + 8 * documents
        if size != expected or documents == 0:
            raise ValueError(
                f"{os.path.basename(index)!r} has {size} bytes, must have {expected} for {sequences} sequences and "
                f"{documents - 1} documents"
            )
        mapped = np.memmap(index, np.uint8, "r").view(np.ndarray)
        self._sizes_N = np.frombuffer(mapped, "<i4", sequences, _HEADER.size)
        self._pointers_N = np.frombuffer(mapped, "<i8", sequences, _HEADER.size + 4 * sequences)
        self._first_D = np.frombuffer(mapped, "<i8", documents, _HEADER.size + 12 * sequences)
        self._dtype = np.dtype(_DTYPES[code])
        self.num_documents = documents - 1
        length = os.path.getsize(path)
        end = int(self._pointers_N[-1]) + int(self._sizes_N[-1]) * self._dtype.itemsize if sequences else 0
        if length != end:
            raise ValueError(f"has {length} bytes, and {os.path.basename(index)!r} is for {end}")
        self._tokens = np.memmap(path, self._dtype, "r").view(np.ndarray) if length else np.empty(0, self._dtype)

    def read(self, part: Part, start_row: int, eos_id: int, vocab_size: int) -> Iterator[tuple[int, np.ndarray]]:
        """Documents of the part from ``start_row`` on: the number in the part, and the ids, int64, that end in
        ``eos_id``. Documents without any other token are left out.

        Raises:
            ValueError: naming the document: when an id is at or above ``vocab_size``, or the index is damaged.
        """
        row, end = part.begin + start_row, self.num_documents if part.end is None else part.end
        while row < end:
            bounds = self._bounds(row, min(row + _DOCUMENTS_TOGETHER, end))
            count = max(1, int(np.searchsorted(bounds, bounds[0] + _TOGETHER, "right")) - 1)
            first = int(bounds[0])
            tokens = self._tokens[first : bounds[count]]
            if len(tokens) and (int(tokens.max()) >= vocab_size or int(tokens.min()) < 0):
                wrong = first + int(np.argmax((tokens >= vocab_size) | (tokens < 0)))
                document = row + int(np.searchsorted(bounds[: count + 1], wrong, "right"))
                raise ValueError(
                    f"document {document} holds the id {self._tokens[wrong]}, the tokenizer's go up to {vocab_size - 1}"
                )
            tokens = tokens.astype(np.int64)
            edges = (bounds[: count + 1] - first).tolist()
            for i in range(count):
                document = tokens[edges[i] : edges[i + 1]]
                if len(document) and document[-1] != eos_id:
                    document = np.append(document, eos_id)
                if len(document) > 1:
                    yield row + i - part.begin, document
            row += count

    def num_tokens(self, eos_id: int) -> int:
        """Of all documents as :meth:`read` gives them."""
        total = 0
        for row in range(0, self.num_documents, _DOCUMENTS_TOGETHER):
            bounds = self._bounds(row, min(row + _DOCUMENTS_TOGETHER, self.num_documents))
            lengths, ends = np.diff(bounds), bounds[1:]
            open_ended = self._tokens[ends[lengths > 0] - 1] != eos_id
            lengths = lengths[lengths > 0] + open_ended
            total += int(lengths[lengths > 1].sum())
        return total

    def _bounds(self, row: int, end: int) -> np.ndarray:
        """Where the documents begin, in tokens, and where the last one ends: int64 ``[end - row + 1]``."""
        first, sequences = self._first_D[row : end + 1], len(self._sizes_N)
        if first[0] >= 0 and first[-1] <= sequences and (np.diff(first) >= 0).all():
            chosen = slice(int(first[0]), int(first[-1]))
            edges = np.append(self._pointers_N[chosen], self._end_of(chosen.stop))
            sizes = self._sizes_N[chosen].astype(np.int64) * self._dtype.itemsize
            if edges[0] >= 0 and (np.diff(edges) == sizes).all() and (sizes >= 0).all():
                bounds = edges[first - first[0]] // self._dtype.itemsize
                if bounds[-1] <= len(self._tokens):
                    return bounds
        raise ValueError(f"the index is damaged: documents {row + 1} to {end} are not one after the other")

    def _end_of(self, sequence: int) -> int:
        """The byte behind the sequences before this one."""
        if sequence == 0:
            return 0
        return int(self._pointers_N[sequence - 1]) + int(self._sizes_N[sequence - 1]) * self._dtype.itemsize


def index_of(path: str) -> str:
    """Of ``X.bin``, its ``X.idx``."""
    return path.removesuffix(BIN) + INDEX


def bin_files(field: str, files: Sequence[str]) -> list[str]:
    """The ``.bin`` files that are meant by files ending in ``.bin`` or ``.idx``, each once.

    Raises:
        ConfigError: naming ``field`` and the file: when it ends in something else, or one of the two is missing.
    """
    found: dict[str, None] = {}
    for file in files:
        stem, end = os.path.splitext(file)
        if end not in (BIN, INDEX):
            raise ConfigError(f"{field}: {file!r}: must end in {BIN} or {INDEX}")
        if not os.path.exists(stem + BIN):
            raise ConfigError(f"{field}: {file!r}: has no {os.path.basename(stem + BIN)!r} beside it")
        found[stem + BIN] = None
    return list(found)


def read_about(path: str) -> dict:
    """What ``X.json`` says of ``X.bin``; empty where there is none.

    Raises:
        ValueError: when it is damaged.
    """
    about = path.removesuffix(BIN) + ABOUT
    if not os.path.exists(about):
        return {}
    try:
        found = json.loads(Path(about).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{os.path.basename(about)!r} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{os.path.basename(about)!r} is damaged: must be an object of JSON")
    return found


class TokenWriter:
    """Writes ``X.bin`` and ``X.idx`` of documents of one sequence each; they appear whole or not at all.

    Args:
        path: ``X.bin``.
        vocab_size: decides how wide an id is.
    """

    def __init__(self, path: str, vocab_size: int) -> None:
        self._path = path
        self._code = _UINT16 if vocab_size < _MOST_OF_UINT16 else _INT32
        self._file = open(path + UNFINISHED, "wb")  # noqa: SIM115
        self._sizes: list[int] = []

    def add(self, pieces: Iterator[np.ndarray] | Sequence[np.ndarray]) -> None:
        """A document's ids, in one part or several."""
        size = 0
        for ids in pieces:
            self._file.write(ids.astype(_DTYPES[self._code]).tobytes())
            size += len(ids)
        self._sizes.append(size)

    def finish(self) -> int:
        """Closes the files; returns how many tokens there are."""
        _sync(self._file)
        os.replace(self._file.name, self._path)
        _write_index(index_of(self._path), self._code, [np.array(self._sizes, "<i4")])
        return sum(self._sizes)


def merge(parts: Sequence[str], path: str) -> tuple[int, int]:
    """Writes ``X.bin`` and ``X.idx`` of the documents of all parts, in their order, in little memory.

    Returns:
        How many documents and tokens there are.
    """
    files = [TokenFile(part) for part in parts]
    (code,) = {next(code for code, name in _DTYPES.items() if np.dtype(name) == file._dtype) for file in files}
    with open(path + UNFINISHED, "wb") as merged:
        for part in parts:
            with open(part, "rb") as file:
                shutil.copyfileobj(file, merged, _COPIED)
        tokens = merged.tell() // np.dtype(_DTYPES[code]).itemsize
        _sync(merged)
    os.replace(path + UNFINISHED, path)
    _write_index(index_of(path), code, [file._sizes_N for file in files])
    return sum(file.num_documents for file in files), tokens


def write_about(path: str, about: dict) -> None:
    """Writes ``X.json``: the pair is complete."""
    replace_text(Path(path.removesuffix(BIN) + ABOUT), json.dumps(about, indent=2) + "\n")


def _write_index(path: str, code: int, sizes: Sequence[np.ndarray]) -> None:
    count, at, item = sum(map(len, sizes)), 0, np.dtype(_DTYPES[code]).itemsize
    with open(path + UNFINISHED, "wb") as file:
        file.write(_HEADER.pack(_MAGIC, _VERSION, code, count, count + 1))
        for sizes_N in sizes:
            file.write(sizes_N.astype("<i4").tobytes())
        for sizes_N in sizes:
            ends = at + np.cumsum(sizes_N, dtype=np.int64) * item
            file.write((ends - sizes_N.astype(np.int64) * item).astype("<i8").tobytes())
            at = int(ends[-1]) if len(ends) else at
        for first in range(0, count + 1, _COPIED):
            file.write(np.arange(first, min(first + _COPIED, count + 1), dtype="<i8").tobytes())
        _sync(file)
    os.replace(path + UNFINISHED, path)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
