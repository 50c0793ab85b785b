"""What a source holds, by reading some of it: tokens of an epoch, and how long its documents are."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq

from minimax_train.data.config import MEGATRON
from minimax_train.data.held_out import Keeps
from minimax_train.data.readers import BadDocument, line_size
from minimax_train.data.shuffle import permutation
from minimax_train.data.sources import Document, Source
from minimax_train.data.token_files import TokenFile
from minimax_train.data.tokenizer import LONG_DOCUMENT, Tokenizer

_TOGETHER = 32  # documents of a file that are read before it is another file's turn
_OPEN = 16  # files that take turns


@dataclass
class Survey:
    """What was read of a source.

    Attributes:
        lengths: tokens of each document, its end included.
        part: how much of the source that was; 1 for all, None where it cannot be told.
    """

    lengths: list[int]
    part: float | None

    @property
    def epoch_tokens(self) -> float | None:
        """Tokens of the whole source: exact where all of it was read."""
        return None if self.part is None else sum(self.lengths) / self.part


def survey(source: Source, tokenizer: Tokenizer, keeps: Keeps | None, tokens: float) -> Survey:
    """Read documents of files all over a source, until these are so many tokens or all there are.

    Args:
        keeps: documents that count; all if None.

    Raises:
        ConfigError: when one cannot be read.
    """
    order = permutation(len(source.shards), "survey")
    waiting, taking_turns = deque(order), deque[_File]()
    files: list[_File] = []
    lengths: list[int] = []
    read = 0
    while read < tokens and (waiting or taking_turns):
        if waiting and len(taking_turns) < _OPEN:
            files.append(_File(source, waiting.popleft()))
            taking_turns.append(files[-1])
        file = taking_turns.popleft()
        found = [content for content in file.take(_TOGETHER) if keeps is None or keeps(content)]
        lengths += _lengths(found, tokenizer)
        read = sum(lengths[-len(found) :], read) if found else read
        if not file.is_done:
            taking_turns.append(file)
    return Survey(lengths, _part(source, files, everything=not waiting and not taking_turns))


def _lengths(contents: list[str | np.ndarray], tokenizer: Tokenizer) -> list[int]:
    """Tokens of each, those of tokens first: texts are encoded together, but for long ones."""
    lengths = [len(content) for content in contents if not isinstance(content, str)]
    texts = [content for content in contents if isinstance(content, str)]
    lengths += map(len, tokenizer.encode_documents([text for text in texts if len(text) <= LONG_DOCUMENT]))
    long = (tokenizer.encode_in_pieces(text) for text in texts if len(text) > LONG_DOCUMENT)
    return lengths + [sum(map(len, pieces)) for pieces in long]


class _File:
    """One of a source's files, being read."""

    def __init__(self, source: Source, index: int) -> None:
        self.name, self.is_done = source.shards[index], False
        self.last: Document | None = None
        self._documents: Iterator[Document] = source.read(index)

    def take(self, count: int) -> Iterator[str | np.ndarray]:
        for _ in range(count):
            document = next(self._documents, None)
            if document is None:
                self.is_done = True
                return
            self.last = document
            if not isinstance(document.content, BadDocument):
                yield document.content

    def part(self, file_format: str | None) -> float | None:
        """How much of the file was read; None where it cannot be told."""
        if self.is_done:
            return 1.0
        if self.last is None or not os.path.isfile(self.name):
            return None
        rows, size = self.last.row + 1, os.path.getsize(self.name)
        if self.last.following:
            return self.last.following / size
        if file_format == "parquet":
            return rows / pq.read_metadata(self.name).num_rows
        if file_format == MEGATRON:
            return rows / TokenFile(self.name).num_documents
        line = line_size(self.name) if file_format == "json" else None
        return None if line is None else min(1.0, rows * line / size)


def _part(source: Source, files: list[_File], *, everything: bool) -> float | None:
    """Of all files' bytes, those that were read; of all files, where they are elsewhere."""
    if everything:
        return 1.0
    parts = [file.part(source.format) for file in files]
    is_here = all(map(os.path.isfile, source.shards))
    size = {name: os.path.getsize(name) if is_here else 1 for name in source.shards}
    if None in parts:
        return None
    return sum(size[file.name] * part for file, part in zip(files, parts, strict=True) if part) / sum(size.values())
