"""Streams: the fixed number of endless document sequences that a data set is dealt into.

Which documents a stream holds, and in which order, depends on the data set, the number of streams and the seed; never
on the ranks that read it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice

import numpy as np

from minimax_train.data.shuffle import permutation
from minimax_train.data.sources import Source
from minimax_train.data.tokenizer import Tokenizer
from minimax_train.errors import ConfigError

ENCODED_TOGETHER = 32  # documents, each by a thread of its own as long as there are CPU cores
_DOCUMENTS_COUNTED = 10_000  # for a message; counting all of a large data set would look like a hang


@dataclass(frozen=True)
class Place:
    """Where reading goes on: in ``epoch``, at ``row`` of the ``shard``-th shard of the epoch's order.

    ``index`` counts the documents read in the epoch, this stream's and the others'.
    """

    epoch: int = 0
    shard: int = 0
    row: int = 0
    index: int = 0


class DocumentStream:
    """One stream's documents as token ids, epoch after epoch.

    With at least as many shards as streams, stream s reads the shards s, s + num_streams, ... With fewer, every stream
    reads every shard and keeps the documents whose index in the epoch is s modulo the number of streams. Documents are
    permuted within blocks of ``shuffle_documents``, shards within an epoch; so the whole position is the place where
    the block starts and the number of its documents taken.

    Args:
        source: the data set.
        tokenizer: encodes the documents.
        stream: index of this stream, below ``num_streams``.
        num_streams: streams the data set is dealt into.
        seed: draws the permutations.
        shuffle_documents: block size; 1 keeps the reading order.
        repeat: whether another epoch follows the last document.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        *,
        stream: int,
        num_streams: int,
        seed: int,
        shuffle_documents: int,
        repeat: bool = True,
    ) -> None:
        self._source, self._tokenizer = source, tokenizer
        self._stream, self._num_streams = stream, num_streams
        self._seed, self._shuffle_documents, self._repeat = seed, shuffle_documents, repeat
        self._deals_shards = len(source.shards) >= num_streams
        self._restart(Place(), block=0, taken=0)

    def next_document(self) -> np.ndarray | None:
        """The next document's ids, int64, its end included; None after the last one where epochs do not repeat.

        Raises:
            ConfigError: when the stream has no document at all, the data cannot be read, or is not that of the saved
                position.
        """
        texts = self._texts
        if texts is None:
            texts = self._read_block()
            if self._taken > len(texts):
                raise ConfigError(
                    f"{self._source.description}: the data changed: the saved position is {self._taken} documents into "
                    f"a block that now holds {len(texts)}"
                )
        while self._taken == len(texts):
            if texts:
                self._place, self._block, self._taken = self._next_place, self._block + 1, 0
            elif self._block == 0:
                raise ConfigError(self._no_document())
            elif self._repeat:
                self._restart(Place(epoch=self._place.epoch + 1), block=0, taken=0)
            else:
                return None
            texts = self._read_block()
        if not self._encoded:
            ahead = slice(self._taken, self._taken + ENCODED_TOGETHER)
            self._encoded.extend(self._tokenizer.encode_documents(texts[ahead]))
        self._taken += 1
        return self._encoded.popleft()

    def state_dict(self) -> dict[str, int]:
        """The position after the last document returned, in integers."""
        return {**asdict(self._place), "block": self._block, "taken": self._taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from a position that ``state_dict`` gave for the same source, streams, seed and block size."""
        place = Place(**{name: state[name] for name in asdict(Place())})
        self._restart(place, state["block"], state["taken"])

    def _restart(self, place: Place, block: int, taken: int) -> None:
        """To the block that starts at ``place``; its texts are read when they are needed."""
        self._reader = self._read(place)
        self._place, self._block, self._taken = place, block, taken
        self._texts: list[str] | None = None
        self._encoded: deque[np.ndarray] = deque()  # the first of the block's documents that were not taken

    def _read_block(self) -> list[str]:
        texts, self._next_place = [], self._place
        for place, text in self._reader:
            self._next_place = place
            texts.append(text)
            if len(texts) == self._shuffle_documents:
                break
        key = ("documents", self._seed, self._stream, self._place.epoch, self._block)
        order = permutation(len(texts), *key) if self._shuffle_documents > 1 else range(len(texts))
        self._texts = [texts[i] for i in order]
        return self._texts

    def _read(self, place: Place) -> Iterator[tuple[Place, str]]:
        """This stream's documents of one epoch from ``place`` on, each with the place that follows it."""
        shards = self._shards(place.epoch)
        index = place.index
        for position in range(place.shard, len(shards)):
            start = place.row if position == place.shard else 0
            for row, text in self._source.read(shards[position], start):
                mine = self._deals_shards or index % self._num_streams == self._stream
                index += 1
                if mine:
                    yield replace(place, shard=position, row=row + 1, index=index), text

    def _shards(self, epoch: int) -> list[int]:
        if self._deals_shards:
            mine = range(self._stream, len(self._source.shards), self._num_streams)
            return [mine[i] for i in permutation(len(mine), "shards", self._seed, self._stream, epoch)]
        # All streams read in the same order, or a document's index would not be the same for all.
        return permutation(len(self._source.shards), "shards", self._seed, epoch)

    def _no_document(self) -> str:
        found = sum(1 for _ in islice(self._source.documents(), _DOCUMENTS_COUNTED))
        if found == 0:
            return f"{self._source.description}: holds no document (or only empty ones)"
        if self._deals_shards:
            names = [self._source.shards[i] for i in self._shards(0)]
            shown = f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            reason = f"its files hold none ({shown})"
        else:
            reason = f"at most {found} streams can be filled"
        counted = f"{found} or more" if found == _DOCUMENTS_COUNTED else found
        return (
            f"data.num_streams={self._num_streams}: stream {self._stream} got none of the {counted} documents found in "
            f"{self._source.description}: {reason}"
        )
