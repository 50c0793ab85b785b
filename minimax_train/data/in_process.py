"""Reading, tokenising and packing: what a worker is asked for, and the worker that is no process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Protocol

from minimax_train.data.config import DataConfig
from minimax_train.data.held_out import Keeps, kept_in_training
from minimax_train.data.mixture import MixtureStream
from minimax_train.data.packing import PackedSequence, SequencePacker
from minimax_train.data.readers import BadDocument
from minimax_train.data.sources import TRAIN, Source, open_sources
from minimax_train.data.streams import DocumentStream, Lengths, Split, splitter
from minimax_train.data.tokenizer import Tokenizer
from minimax_train.errors import ConfigError

_DOCUMENTS_SAMPLED, _CHARACTERS_SAMPLED = 1000, 1000


@dataclass(frozen=True, eq=False)
class Packed:
    """Packed sequences, and of the streams they are from: the state after them, the bad documents passed over since the
    beginning of the run, and what there is to say."""

    sequences: list[PackedSequence]
    states: dict[int, dict]
    skipped: dict[int, int]
    notes: list[str]


@dataclass(frozen=True)
class Streams:
    """Which of a run's streams to pack, and out of what; what a worker process is sent.

    Attributes:
        digests: whether to look into all files for their digests.
    """

    config: DataConfig
    tokenizer: Tokenizer
    seed: int
    streams: Sequence[int]
    digests: bool


@dataclass(frozen=True)
class OpenedSource:
    """What opening a source told.

    Attributes:
        files: by name.
        digests: what each file's content is told from another's by; None where nobody asked for them.
        identity: what the documents depend on besides the files' content, by configuration field.
        fingerprint: of the files in the states that earlier versions saved.
        format: how files are read (:class:`Source`).
    """

    files: Sequence[str]
    digests: Sequence[str] | None
    identity: Mapping[str, str | float | None]
    fingerprint: str
    format: str | None


@dataclass(frozen=True)
class Opened:
    """What opening the data told: of the sources, by name, and the states of the streams at the beginning."""

    states: dict[int, dict]
    sources: Mapping[str, OpenedSource]


@dataclass(frozen=True)
class Cursors:
    """Opens a run's cursors over its sources.

    Attributes:
        sources: by name, of training documents.
        keeps: which documents each source's cursors return.
        splits: each source, cut for the streams.
    """

    config: DataConfig
    tokenizer: Tokenizer
    seed: int
    sources: Mapping[str, Source]
    keeps: Mapping[str, Keeps | None]
    splits: Mapping[str, Split]

    @classmethod
    def of(cls, config: DataConfig, tokenizer: Tokenizer, seed: int) -> Cursors:
        sources = {name: source.with_tokenizer(tokenizer) for name, source in open_sources(config, TRAIN).items()}
        splits = {name: splitter(source, config.num_streams) for name, source in sources.items()}
        return cls(config, tokenizer, seed, sources, kept_in_training(config, tokenizer), splits)

    def open(self, stream: int, name: str, only: int | None) -> DocumentStream:
        """A stream's cursor over a source's documents; of one length, or of all."""
        config = self.config
        return DocumentStream(
            self.sources[name],
            self.tokenizer,
            stream=stream,
            num_streams=config.num_streams,
            seed=self.seed,
            shuffle_documents=config.shuffle_documents,
            lengths=Lengths(config.medium_length, config.long_length),
            path=config.path_of(name),
            max_epochs=config.named_sources[name].max_epochs,
            only=only,
            keeps=self.keeps[name],
            split=self.splits[name],
        )


class Worker(Protocol):
    """Packs some of a rank's streams. One request for sequences is under way at a time."""

    def opened(self) -> Opened:
        """Wait until the data set is open.

        Raises:
            ConfigError: when it cannot be opened.
        """
        ...

    def place(self, states: dict[int, dict]) -> None:
        """Go on from other positions, by stream; what was asked for is dropped."""
        ...

    def ask(self, streams: Sequence[int], length: int, weights: Mapping[str, float]) -> None:
        """Ask for the next sequence of ``length`` tokens of each of these streams, one after the other.

        Args:
            weights: share of the tokens by component of the mixture.
        """
        ...

    def receive(self) -> Packed:
        """What was asked for, in that order.

        Raises:
            ConfigError, TrainingError: what went wrong while reading; or that the worker process ended or hangs.
        """
        ...

    def leave(self) -> None:
        """Ask for nothing more: the process ends when all its ranks have left."""
        ...

    def close(self) -> None:
        """Wait for the process to end."""
        ...


class InProcess:
    """A worker that is no process: it packs what was asked for when it is received."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._opened: Opened | None = None
        self._packers: dict[int, SequencePacker] = {}
        self._asked: tuple[Sequence[int], int, Mapping[str, float]] | None = None

    def opened(self) -> Opened:
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def _open(self) -> Opened:
        config, tokenizer, mine = self._streams.config, self._streams.tokenizer, self._streams.streams
        cursors = Cursors.of(config, tokenizer, self._streams.seed)
        opened = {}
        for name, source in cursors.sources.items():
            # Where documents are dealt one by one, the last stream is the first that has none.
            last = cursors.open(max(mine), name, None)
            for stream in mine if last.deals_shards else [max(mine)]:
                cursors.open(stream, name, None).check()
            _check_targets(source, tokenizer)
            digests = source.digests() if self._streams.digests else None
            held_out = {f"{config.path_of(name)}.held_out": config.named_sources[name].held_out}
            identity = {**source.identity, **held_out}
            opened[name] = OpenedSource(source.files, digests, identity, source.fingerprint, source.format)
        for stream in mine:
            documents = MixtureStream(list(cursors.sources), partial(cursors.open, stream))
            self._packers[stream] = SequencePacker(documents, config.packing)
        return Opened({stream: packer.state_dict() for stream, packer in self._packers.items()}, opened)

    def place(self, states: dict[int, dict]) -> None:
        for stream, state in states.items():
            self._packers[stream].load_state_dict(state)
        self._asked = None

    def ask(self, streams: Sequence[int], length: int, weights: Mapping[str, float]) -> None:
        self._asked = streams, length, weights

    def receive(self) -> Packed:
        assert self._asked is not None, "nothing was asked for"
        streams, length, weights = self._asked
        sequences = [self._pack(stream, length, weights) for stream in streams]
        self._asked = None
        packers = {stream: self._packers[stream] for stream in dict.fromkeys(streams)}
        return Packed(
            sequences,
            {stream: packer.state_dict() for stream, packer in packers.items()},
            {stream: packer.documents.skipped for stream, packer in packers.items()},
            [note for packer in packers.values() for note in packer.documents.take_notes()],
        )

    def _pack(self, stream: int, length: int, weights: Mapping[str, float]) -> PackedSequence:
        sequence = self._packers[stream].next_sequence(length, weights)
        assert sequence is not None, "streams that train repeat for ever"
        return sequence

    def leave(self) -> None:
        pass

    def close(self) -> None:
        pass


def _check_targets(source: Source, tokenizer: Tokenizer) -> None:
    """Refuse documents of one token each, with which a model learns nothing but to end them."""
    every = chain.from_iterable(source.read(shard) for shard in range(len(source.shards)))
    found = (d.content for d in every if not isinstance(d.content, BadDocument))
    for content in islice(found, _DOCUMENTS_SAMPLED):
        if isinstance(content, str):
            (content,) = tokenizer.encode_documents([content[:_CHARACTERS_SAMPLED]])
        if len(content) > 2:
            return
    raise ConfigError(
        f"{source.description}: no document (of the first {_DOCUMENTS_SAMPLED}) is longer than one token: there is "
        "nothing to learn but its end; is this the text to train on?"
    )
