"""Streams: the fixed number of endless document sequences that a data set is dealt into.

Which documents a stream holds, and in which order, depends on the data set, the number of streams and the seed; never
on the ranks that read it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from hashlib import blake2b
from itertools import chain, islice
from typing import NamedTuple

import numpy as np

from minimax_train.data.config import LENGTHS
from minimax_train.data.held_out import Content, Keeps
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


Split = Callable[[int], Source]
"""A source cut for the streams, by the number of its files that an epoch began with."""


def splitter(source: Source, num_streams: int) -> Split:
    """:meth:`Source.split`, which looks into files, once for each number of files."""
    return lru_cache(maxsize=4)(partial(source.split, num_streams))


class Place(NamedTuple):
    """Where reading goes on: in ``epoch``, at ``row`` of the ``shard``-th shard of the epoch's order.

    ``num_files`` are those that the epoch began with: files that a resumed run finds added are read from the next
    epoch on. ``following`` is where ``row`` begins (:class:`Document`). ``index`` counts the documents read in the
    epoch, this stream's and the others'. ``skipped`` counts this stream's bad documents since the beginning of the run.
    """

    num_files: int
    epoch: int = 0
    shard: int = 0
    row: int = 0
    following: int = 0
    index: int = 0
    skipped: int = 0


class Position(NamedTuple):
    """Of a stream: the place where its block starts, the number of the block in the epoch, how many of its documents
    the stream has passed, and a hash of all of them (0 where it is not known)."""

    place: Place
    block: int = 0
    taken: int = 0
    content: int = 0

    def state_dict(self) -> dict[str, int]:
        return {**self.place._asdict(), "block": self.block, "taken": self.taken, "content": self.content}

    @classmethod
    def of(cls, state: Mapping[str, int]) -> Position:
        place = Place(**{name: state[name] for name in Place._fields})
        return cls(place, state["block"], state["taken"], state["content"])


class NoEpochLeft(ConfigError):
    """A stream needs another document and has had all its epochs."""


class Lengths(NamedTuple):
    """Tokens, the end of text included, from which on a document is a medium one, and a long one."""

    medium: int
    long: int

    def of(self, tokens: int) -> int:
        """A document's length as an index of :data:`~minimax_train.data.config.LENGTHS`."""
        return (tokens >= self.medium) + (tokens >= self.long)


class TokenDocument(NamedTuple):
    """A document's ids, int64, its end included, in one part or in several, which are encoded as they are asked for;
    and its length as an index of :data:`~minimax_train.data.config.LENGTHS`."""

    pieces: Iterator[np.ndarray]
    length: int


class _Document(NamedTuple):
    """A document that was read, the shard and row it is from, and the place that follows it."""

    content: Content | BadDocument
    shard: int
    row: int
    following: Place


class DocumentStream:
    """One stream's documents as token ids, epoch after epoch.

    The shards of :meth:`Source.split` are dealt out: stream s reads the shards s, s + num_streams, ... Where they are
    fewer than the streams, every stream reads every shard and keeps the documents whose index in the epoch is s modulo
    the number of streams. Documents are permuted within blocks of ``shuffle_documents``, shards within an epoch; so the
    whole position is the place where the block starts and the number of its documents passed.

    Args:
        source: the data set.
        tokenizer: encodes the documents.
        stream: index of this stream, below ``num_streams``.
        num_streams: streams the data set is dealt into.
        seed: draws the permutations.
        shuffle_documents: block size; 1 keeps the reading order. Documents of 64 M characters end a block as well.
        lengths: tells short, medium and long documents apart.
        path: dotted, of the group that configures the source, for messages.
        repeat: whether another epoch follows the last document.
        max_epochs: how many there may be; None for no limit.
        only: the length of the documents returned (an index of ``LENGTHS``); None for any. Positions do not depend on
            it.
        keeps: which documents are returned; None for all. Positions do not depend on it.
        split: of :func:`splitter`, which streams over the same source may share.
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
        lengths: Lengths,
        path: str = "data",
        repeat: bool = True,
        max_epochs: int | None = None,
        only: int | None = None,
        keeps: Keeps | None = None,
        split: Split | None = None,
    ) -> None:
        self._tokenizer, self._stream, self._num_streams = tokenizer, stream, num_streams
        self._seed, self._shuffle_documents, self._repeat = seed, shuffle_documents, repeat
        self._lengths, self._only, self._keeps = lengths, only, keeps
        self._path, self._max_epochs = path, max_epochs
        self._source = source
        self._split = split or splitter(source, num_streams)
        self._notes: list[str] = []
        self._said = 0
        self.go_to(Position(self._start))

    @classmethod
    def once(
        cls,
        source: Source,
        tokenizer: Tokenizer,
        *,
        lengths: Lengths,
        path: str,
        only: int | None = None,
        keeps: Keeps | None = None,
    ) -> DocumentStream:
        """All documents of a source once, in their order."""
        return cls(
            source,
            tokenizer,
            stream=0,
            num_streams=1,
            seed=0,
            shuffle_documents=1,
            lengths=lengths,
            path=path,
            repeat=False,
            only=only,
            keeps=keeps,
        )

    def next_document(self, *, keep_all: bool = False) -> TokenDocument | None:
        """The next document; None after the last one where epochs do not repeat.

        Args:
            keep_all: return it although ``keeps`` says otherwise; for the first documents after :meth:`go_to`.

        Raises:
            ConfigError: when the stream has no such document at all, has no epoch left, the data cannot be read, or are
                not those of the position.
        """
        block = self._documents
        if block is None:
            block = self._read_saved_block()
        while True:
            while not self._encoded and self._looked < len(block):
                self._encode_ahead(block, keep_all)
            if self._encoded:
                self._taken, document = self._encoded.popleft()
                self._found_none = False
                return document
            self._taken = len(block)
            if not self._next_block(bool(block)):
                return None
            block = self._documents
            assert block is not None

    @property
    def document(self) -> str:
        """Names the document returned last, for messages."""
        assert self._documents is not None
        last = self._documents[self._taken - 1]
        name = self._split(self._place.num_files).shards[last.shard]
        return f"{self._source.description}: {name!r}, row {last.row + 1}"

    @property
    def position(self) -> Position:
        """After the document returned last."""
        return Position(self._place, self._block, self._taken, self._content)

    @property
    def epoch(self) -> int:
        """Of the document returned last, from 0."""
        return self._place.epoch

    @property
    def is_last_epoch(self) -> bool:
        return self.epoch + 1 == self._max_epochs

    @property
    def part(self) -> str:
        """What it reads, for messages."""
        only = "" if self._only is None else f" of the length {LENGTHS[self._only]!r}"
        return f"stream {self._stream} of {self._source.description}{only}"

    @property
    def limit(self) -> str:
        return f"{self._path}.max_epochs={self._max_epochs}"

    @property
    def skipped(self) -> int:
        """This stream's bad documents since the beginning of the run, up to the block of the document returned last."""
        return (self._place if self._documents is None else self._next_place).skipped

    def take_notes(self) -> list[str]:
        """What there is to say since the last call: the first bad documents that were passed over."""
        notes, self._notes = self._notes, []
        return notes

    def go_to(self, position: Position) -> None:
        """Goes on from a position of the same source, stream, streams, seed and block size; reads when it must."""
        place, self._block, self._taken = position.place, position.block, position.taken
        self._begin(place, position.content)
        self._found_none = position == Position(Place(place.num_files, place.epoch, skipped=place.skipped))

    def refuse_cut(self, position: Position) -> None:
        """Refuse a position of a version that dealt the documents of few files one by one, where files are cut now.

        Raises:
            ConfigError: naming what to do.
        """
        num_files = position.place.num_files
        if len(self._split(num_files).shards) != num_files:
            raise ConfigError(
                f"{self._source.description}: the saved position is of a version that dealt the documents of fewer "
                f"files ({num_files}) than data.num_streams={self._num_streams} one by one; now each stream reads a "
                "part of each file, and the position means nothing. Go on with that version, or begin a new run with "
                "checkpoint.initial_weights"
            )

    def check(self) -> None:
        """Reads the first document.

        Raises:
            ConfigError: when there is none, or it cannot be read.
        """
        if all(isinstance(document.content, BadDocument) for document in self._read(self._start)):
            raise ConfigError(self._no_document())

    @property
    def deals_shards(self) -> bool:
        """Whether the stream reads shards of its own, rather than its share of the documents of all shards."""
        return len(self._split(len(self._source.files)).shards) >= self._num_streams

    @property
    def _start(self) -> Place:
        return Place(len(self._source.files))

    def _begin(self, place: Place, content: int = 0) -> None:
        """At the block that starts at ``place``; its documents are read when they are needed."""
        self._reader, self._place, self._content = self._read(place), place, content
        self._documents: list[_Document] | None = None
        self._encoded: deque[tuple[int, TokenDocument]] = deque()  # and the block's documents passed with it
        self._looked = 0  # documents of the block that were encoded or passed over

    def _read_saved_block(self) -> list[_Document]:
        """The block of a position, from the document on at which the position is."""
        saved = self._content
        block = self._read_block()
        if self._taken > len(block) or saved not in (0, self._content):
            source, shards = self._dealt(self._place)
            name = source.shards[shards[self._place.shard]] if shards else "an empty data set"
            raise ConfigError(
                f"{self._source.description}: the data changed: the saved position is among the documents that "
                f"follow row {self._place.row} of {name!r}, and these are not the same any more"
            )
        self._looked = self._taken
        return block

    def _next_block(self, after_another: bool) -> bool:
        """Reads the next block that has documents, in this epoch or in the next; False where there is none."""
        while True:
            if after_another:
                self._place, self._block = self._next_place, self._block + 1
            elif self._block == 0:
                raise ConfigError(self._no_document())
            elif self._repeat:
                self._next_epoch()
            else:
                return False
            self._taken = self._looked = 0
            if self._read_block():
                return True
            after_another = False

    def _next_epoch(self) -> None:
        if self._found_none:
            raise ConfigError(self._none_kept())
        epoch = self._place.epoch + 1
        if epoch == self._max_epochs:
            raise NoEpochLeft(
                f"{self.limit}: {self.part} has had its last epoch and needs another document; allow more epochs, give "
                "the source less weight, or end the run before"
            )
        self._block = 0
        self._begin(Place(len(self._source.files), epoch, skipped=self._next_place.skipped))
        self._found_none = True

    def _read_block(self) -> list[_Document]:
        self._next_place, content = self._place, blake2b(digest_size=8)
        documents, size = [], 0
        for document in self._reader:
            self._next_place = document.following
            if isinstance(document.content, BadDocument):
                self._note(document.content)
                continue
            documents.append(document)
            size += len(document.content)
            encoded = document.content.encode() if isinstance(document.content, str) else document.content.tobytes()
            content.update(f"{len(encoded)}/".encode())
            content.update(encoded)
            if len(documents) == self._shuffle_documents or size >= _BLOCK_CHARACTERS:
                break
        key = ("documents", self._seed, self._stream, self._place.epoch, self._block)
        order = permutation(len(documents), *key) if self._shuffle_documents > 1 else range(len(documents))
        self._documents, self._content = [documents[i] for i in order], int.from_bytes(content.digest())
        return self._documents

    def _note(self, bad: BadDocument) -> None:
        if self._said < _SAID:
            self._said += 1
            self._notes.append(f"passed over: {bad}")

    def _encode_ahead(self, block: list[_Document], keep_all: bool) -> None:
        """The documents that follow in the block: several at once, or a long one part by part as it is needed."""
        together: list[tuple[int, str]] = []
        characters, most = 0, 1 if keep_all else ENCODED_TOGETHER
        while self._looked < len(block) and len(together) < most:
            content = block[self._looked].content
            assert not isinstance(content, BadDocument)
            is_passed_over = self._keeps is not None and not (keep_all or self._keeps(content))
            if isinstance(content, str) and not is_passed_over and not self._is_surely_shorter(content):
                characters += len(content)
                if together and (characters > _ENCODED_CHARACTERS or len(content) > LONG_DOCUMENT):
                    break
                if len(content) > LONG_DOCUMENT:
                    self._looked += 1
                    self._offer(self._looked, self._tokenizer.encode_in_pieces(content))
                    return
                together.append((self._looked + 1, content))
            self._looked += 1
            if isinstance(content, np.ndarray) and not is_passed_over:
                self._offer(self._looked, iter((content,)))
                return
        encoded = self._tokenizer.encode_documents([text for _, text in together]) if together else []
        for (taken, _), ids in zip(together, encoded, strict=True):
            self._offer(taken, iter((ids,)))

    def _offer(self, taken: int, pieces: Iterator[np.ndarray]) -> None:
        """A document to be returned, if it has the length asked for: as much of it is encoded as tells."""
        read, tokens = [], 0
        for piece in pieces:
            read.append(piece)
            tokens += len(piece)
            if tokens >= self._lengths.long:
                break
        length = self._lengths.of(tokens)
        if self._only in (None, length):
            self._encoded.append((taken, TokenDocument(chain(read, pieces), length)))

    def _is_surely_shorter(self, text: str) -> bool:
        """Whether no encoding is needed to know that a document is shorter than those asked for: its tokens are at most
        its bytes, a space that some tokenizers put before it, and its end."""
        if not self._only or not self._tokenizer.is_byte_level:
            return False
        return self._lengths.of(len(text.encode()) + 2) < self._only

    def _read(self, place: Place) -> Iterator[_Document]:
        """This stream's documents of one epoch from ``place`` on, those that are bad included."""
        source, shards = self._dealt(place)
        deals_shards = len(source.shards) >= self._num_streams
        index, skipped = place.index, place.skipped
        for position in range(place.shard, len(shards)):
            start = (place.row, place.following) if position == place.shard else (0, 0)
            for row, following, content in source.read(shards[position], *start):
                is_bad = isinstance(content, BadDocument)
                # A bad document has no index: it counts in one of the streams that read it.
                mine = deals_shards or (row if is_bad else index) % self._num_streams == self._stream
                index, skipped = index + (not is_bad), skipped + (is_bad and mine)
                if mine:
                    after = Place(place.num_files, place.epoch, position, row + 1, following, index, skipped)
                    yield _Document(content, shards[position], row, after)

    def _dealt(self, place: Place) -> tuple[Source, list[int]]:
        """The shards of an epoch, and what this stream reads of them, in order."""
        source = self._split(place.num_files)
        if len(source.shards) >= self._num_streams:
            mine = range(self._stream, len(source.shards), self._num_streams)
            return source, [mine[i] for i in permutation(len(mine), "shards", self._seed, self._stream, place.epoch)]
        # All streams read in the same order, or a document's index would not be the same for all.
        return source, permutation(len(source.shards), "shards", self._seed, place.epoch)

    def _none_kept(self) -> str:
        whole = f"stream {self._stream} has read all of its part of {self._source.description} and found no document"
        if self._only is not None:
            length = LENGTHS[self._only]
            return (
                f"{self._path}.lengths: {whole} of the length {length!r} (data.medium_length={self._lengths.medium}, "
                f"data.long_length={self._lengths.long}); leave {length} out of {self._path}.lengths"
            )
        return (
            f"data.exclude_held_out, {self._path}.held_out: {whole} that is not held out for evaluation; hold out "
            "fewer, or other ones"
        )

    def _no_document(self) -> str:
        source, shards = self._dealt(self._start)
        every = chain.from_iterable(source.read(shard) for shard in range(len(source.shards)))
        found = sum(1 for d in islice(every, _DOCUMENTS_COUNTED) if not isinstance(d.content, BadDocument))
        if found == 0:
            return f"{self._source.description}: holds no document (or only empty ones{self._or_bad()})"
        if self.deals_shards:
            names = [source.shards[i] for i in shards]
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
