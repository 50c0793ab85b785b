"""Data sets whose every token id is unique, so that tokens can be counted by id."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from minimax_train.data import MicroBatch
from minimax_train.data.sources import Document
from minimax_train.errors import ConfigError
from minimax_train.recipe import StepPlan

EOS = 0


class WordTokenizer:
    """A document is numbers in words: ``"7 8"`` is 7, 8, end."""

    is_byte_level = True

    def encode_document(self, text: str) -> np.ndarray:
        return np.array([*map(int, text.split()), EOS], dtype=np.int64)

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode_document(text) for text in texts]


class Troubled(WordTokenizer):
    """Meets one kind of trouble after some documents."""

    def __init__(self, trouble, after):
        self.trouble, self.left = trouble, after

    def encode_document(self, text):
        self.left -= 1
        if self.left < 0:
            if self.trouble == "refused":
                raise ConfigError("data.train_files: line 3 is broken")
            if self.trouble == "failed":
                raise KeyError("a mistake in the code")
            if self.trouble == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1000)
        return super().encode_document(text)


def documents(lengths: Sequence[int]) -> list[str]:
    """Documents of these many tokens (without the end), ids 1, 2, 3, ... through all of them."""
    ids = iter(range(1, sum(lengths) + 1))
    return [" ".join(str(next(ids)) for _ in range(length)) for length in lengths]


def random_documents(count: int, seed: int = 0, longest: int = 30) -> list[str]:
    rng = random.Random(seed)
    return documents([rng.randint(1, longest) for _ in range(count)])


@dataclass
class ListSource:
    """A source in memory: shards of documents."""

    contents: list[list[str | np.ndarray | None]]
    description: str = "data.train_files=['listed']"

    @property
    def files(self) -> list[str]:
        return [f"shard {i}" for i in range(len(self.contents))]

    shards = files

    def split(self, num_streams: int, num_files: int | None = None) -> ListSource:
        whole = num_files in (None, len(self.contents))
        return self if whole else replace(self, contents=self.contents[:num_files])

    def read(self, shard: int, start_row: int = 0, offset: int = 0) -> Iterator[Document]:
        for row, text in enumerate(self.contents[shard][start_row:], start_row):
            if text is not None and len(text):
                yield Document(row, 0, text)


def write_shards(folder: Path, file_format: str, shards: Sequence[Sequence[str]]) -> str:
    """Writes each shard's documents as a file (as one file per document for text); returns the glob of them all."""
    folder.mkdir(parents=True, exist_ok=True)
    if file_format == "text":
        for i, text in enumerate(text for shard in shards for text in shard):
            (folder / f"{i:04d}.txt").write_text(text)
        return str(folder / "*.txt")
    for i, shard in enumerate(shards):
        if file_format == "json":
            lines = [json.dumps({"text": text, "number": n}) + "\n" for n, text in enumerate(shard)]
            (folder / f"{i:04d}.jsonl").write_text("".join(lines))
        else:
            table = pa.table({"text": list(shard), "number": range(len(shard))})
            pq.write_table(table, folder / f"{i:04d}.parquet", row_group_size=5)
    return str(folder / ("*.jsonl" if file_format == "json" else "*.parquet"))


def next_micro_batches(
    loader, size: int, number: int, *, length: int, dp_size: int = 1, source="files", weights=None
) -> list[MicroBatch]:
    """What a loader hands out of a step of ``number`` micro-batches of ``size`` packed sequences a rank."""
    plan = StepPlan(
        learning_rate=1.0,
        global_batch_size=size * number * dp_size,
        micro_batch_size=size,
        sequence_length=length,
        rope_base=1e4,
        data_weights=weights or {source: 1.0},
        stage="test",
    )
    return loader.next_micro_batches(plan)


def rows_of(micro_batches: Sequence) -> list[tuple[list[int], list[int], list[int]]]:
    """(tokens, labels, segment lengths) of every packed sequence in micro-batches."""
    rows = []
    for batch in micro_batches:
        length = len(batch.tokens_T) // batch.num_sequences
        edges = batch.documents.bounds
        for start in range(0, batch.num_sequences * length, length):
            inside = [edge for edge in edges if start <= edge <= start + length]
            assert inside[0] == start and inside[-1] == start + length, "a packed sequence's edge is not a document's"
            lengths = [b - a for a, b in pairwise(inside)]
            window = slice(start, start + length)
            rows.append((batch.tokens_T[window].tolist(), batch.labels_T[window].tolist(), lengths))
    return rows
