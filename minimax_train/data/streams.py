"""Streams: the fixed number of endless document sequences that a data set is dealt into.

Which documents a stream holds, and in which order, depends on the data set, the number of streams and the seed; never
on the ranks that read it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from hashlib import blake2b
from itertools import accumulate, islice, takewhile

import numpy as np

from minimax_train.data.readers import BadDocument
from minimax_train.data.shuffle import permutation
from minimax_train.data.sources import Source
from minimax_train.data.tokenizer import LONG_DOCUMENT, Tokenizer
from minimax_train.errors import ConfigError

ENCODED_TOGETHER = 32  # documents, each by a thread of its own as long as there are CPU cores
_ENCODED_CHARACTERS = 1 << 22  # of documents encoded together: seconds of one core
_BLOCK_CHARACTERS = 1 << 26  # ends a block of long documents early, for it is held in memory
_DOCUMENTS_COUNTED = 10_000  # for a message; counting all of a large data set would look like a hang
_SAID = 3  # bad documents that a stream names, of those that it counts


@dataclass(frozen=True)
class Place:
    """Where reading goes on: in ``epoch``, at ``row`` of the ``shard``-th shard of the epoch's order.

    ``num_shards`` are those that the epoch began with: shards that a resumed run finds added are read from the next
    epoch on. ``index`` counts the documents read in the epoch, this stream's and the others'. ``skipped`` counts this
    stream's bad documents since the beginning of the run.
    """

    num_shards: int
    epoch: int = 0
    shard: int = 0
    row: int = 0
    index: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class _Document:
    """A document that was read, where, and the place that follows it."""

    text: str | BadDocument
    shard: int
    row: int
    following: Place


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
        shuffle_documents: block size; 1 keeps the reading order. Documents of 64 M characters end a block as well.
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
        self._notes: list[str] = []
        self._said = 0
        self._restart(Place(len(source.shards)), block=0, taken=0)

    def next_document(self) -> Iterator[np.ndarray] | None:
        """The next document's ids, int64, its end included, in one part or in several; None after the last one where
        epochs do not repeat.

        Raises:
            ConfigError: when the stream has no document at all, the data cannot be read, or is not that of the saved
                position.
        """
        block = self._documents
        if block is None:
            saved = self._content
            block = self._read_block()
            if self._taken > len(block) or saved not in (0, self._content):
                shards = self._shards(self._place)
                name = self._source.shards[shards[self._place.shard]] if shards else "an empty data set"
                raise ConfigError(
                    f"{self._source.description}: the data changed: the saved position is among the documents that "
                    f"follow row {self._place.row} of {name!r}, and these are not the same any more"
                )
        while self._taken == len(block):
            if block:
                self._place, self._block, self._taken = self._next_place, self._block + 1, 0
            elif self._block == 0:
                raise ConfigError(self._no_document())
            elif self._repeat:
                place = Place(len(self._source.shards), self._place.epoch + 1, skipped=self._next_place.skipped)
                self._restart(place, block=0, taken=0)
            else:
                return None
            block = self._read_block()
        if not self._encoded:
            self._encode_ahead(block)
        self._taken += 1
        return self._encoded.popleft()

    @property
    def document(self) -> str:
        """Names the document returned last, for messages."""
        assert self._documents is not None
        last = self._documents[self._taken - 1]
        return f"{self._source.description}: {self._source.shards[last.shard]!r}, row {last.row + 1}"

    @property
    def skipped(self) -> int:
        """This stream's bad documents since the beginning of the run, up to the block of the document returned last."""
        return (self._place if self._documents is None else self._next_place).skipped

    def take_notes(self) -> list[str]:
        """What there is to say since the last call: the first bad documents that were passed over."""
        notes, self._notes = self._notes, []
        return notes

    def state_dict(self) -> dict[str, int]:
        """The position after the last document returned, and a hash of the block's documents, in integers."""
        return {**asdict(self._place), "block": self._block, "taken": self._taken, "content": self._content}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from a position that ``state_dict`` gave for the same source, streams, seed and block size.

        Earlier versions saved neither ``num_shards``, ``skipped`` nor ``content``.
        """
        known = {"num_shards": len(self._source.shards), "skipped": 0, "content": 0, **state}
        place = Place(**{field.name: known[field.name] for field in fields(Place)})
        self._restart(place, known["block"], known["taken"], known["content"])

    def check(self) -> None:
        """Reads the first document.

        Raises:
            ConfigError: when there is none, or it cannot be read.
        """
        found = self._read(Place(len(self._source.shards)))
        if not any(isinstance(document.text, str) for document in found):
            raise ConfigError(self._no_document())

    def _restart(self, place: Place, block: int, taken: int, content: int = 0) -> None:
        """To the block that starts at ``place``; its documents are read when they are needed."""
        self._reader = self._read(place)
        self._place, self._block, self._taken, self._content = place, block, taken, content
        self._documents: list[_Document] | None = None
        self._encoded: deque[Iterator[np.ndarray]] = deque()  # the first of the block's documents that were not taken

    def _read_block(self) -> list[_Document]:
        self._next_place, content = self._place, blake2b(digest_size=8)
        documents, characters = [], 0
        for document in self._reader:
            self._next_place = document.following
            if isinstance(document.text, BadDocument):
                self._note(document.text)
                continue
            documents.append(document)
            encoded = document.text.encode()
            content.update(f"{len(encoded)}/".encode())
            content.update(encoded)
            characters += len(document.text)
            if len(documents) == self._shuffle_documents or characters >= _BLOCK_CHARACTERS:
                break
        key = ("documents", self._seed, self._stream, self._place.epoch, self._block)
        order = permutation(len(documents), *key) if self._shuffle_documents > 1 else range(len(documents))
        self._documents, self._content = [documents[i] for i in order], int.from_bytes(content.digest())
        return self._documents

    def _note(self, bad: BadDocument) -> None:
        if self._said < _SAID:
            self._said += 1
            self._notes.append(f"passed over: {bad}")

    def _encode_ahead(self, block: list[_Document]) -> None:
        """The documents that follow in the block: several at once, or a long one part by part as it is needed."""
        texts = [str(document.text) for document in block[self._taken : self._taken + ENCODED_TOGETHER]]
        if len(texts[0]) > LONG_DOCUMENT:
            self._encoded.append(self._tokenizer.encode_in_pieces(texts[0]))
            return
        lengths = accumulate(map(len, texts))
        short = [t for t, total in zip(texts, lengths, strict=True) if total <= _ENCODED_CHARACTERS]
        short = list(takewhile(lambda text: len(text) <= LONG_DOCUMENT, short))
        self._encoded.extend(iter((ids,)) for ids in self._tokenizer.encode_documents(short))

    def _read(self, place: Place) -> Iterator[_Document]:
        """This stream's documents of one epoch from ``place`` on, those that are bad included."""
        shards = self._shards(place)
        deals_shards = self._deals_shards(place)
        index, skipped = place.index, place.skipped
        for position in range(place.shard, len(shards)):
            start = place.row if position == place.shard else 0
            for row, _, text in self._source.read(shards[position], start):
                assert not isinstance(text, np.ndarray)
                is_bad = isinstance(text, BadDocument)
                # A bad document has no index: it counts in one of the streams that read it.
                mine = deals_shards or (row if is_bad else index) % self._num_streams == self._stream
                index, skipped = index + (not is_bad), skipped + (is_bad and mine)
                if mine:
                    following = replace(place, shard=position, row=row + 1, index=index, skipped=skipped)
                    yield _Document(text, shards[position], row, following)

    def _deals_shards(self, place: Place) -> bool:
        return place.num_shards >= self._num_streams

    def _shards(self, place: Place) -> list[int]:
        """What this stream reads in an epoch, in order."""
        if self._deals_shards(place):
            mine = range(self._stream, place.num_shards, self._num_streams)
            return [mine[i] for i in permutation(len(mine), "shards", self._seed, self._stream, place.epoch)]
        # All streams read in the same order, or a document's index would not be the same for all.
        return permutation(place.num_shards, "shards", self._seed, place.epoch)

    def _no_document(self) -> str:
        place = Place(len(self._source.shards))
        found = sum(1 for _ in islice(self._source.documents(), _DOCUMENTS_COUNTED))
        if found == 0:
            return f"{self._source.description}: holds no document (or only empty ones{self._or_bad()})"
        if self._deals_shards(place):
            names = [self._source.shards[i] for i in self._shards(place)]
            shown = f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            reason = f"its files hold none ({shown})"
        else:
            reason = f"at most {found} streams can be filled"
        counted = f"{found} or more" if found == _DOCUMENTS_COUNTED else found
        return (
            f"data.num_streams={self._num_streams}: stream {self._stream} got none of the {counted} documents found in "
            f"{self._source.description}: {reason}"
        )

    def _or_bad(self) -> str:
        shards = range(len(self._source.shards))
        found = (d.content for shard in shards for d in self._source.read(shard) if isinstance(d.content, BadDocument))
        first = next(found, None)
        return f" and bad ones, the first {first}" if first else ""
