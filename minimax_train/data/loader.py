"""The training loader: packed sequences dealt from the streams to the data-parallel ranks, packed one step ahead.

Sequence g of the run comes from stream g modulo the number of streams and belongs to rank g modulo the data-parallel
size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from minimax_train.data.background import Background
from minimax_train.data.batch import MicroBatch
from minimax_train.data.config import DataConfig
from minimax_train.data.packing import PackedSequence, SequencePacker
from minimax_train.data.sources import TRAIN, Source, open_source
from minimax_train.data.streams import DocumentStream
from minimax_train.data.tokenizer import Tokenizer
from minimax_train.errors import ConfigError
from minimax_train.recipe import StepPlan

_DOCUMENTS_SAMPLED, _CHARACTERS_SAMPLED = 1000, 1000


@dataclass(frozen=True, eq=False)
class _Packed:
    sequence: PackedSequence
    stream: int
    state: dict[str, int]  # the stream's, after this sequence
    skipped: int
    notes: list[str]


class SequenceLoader:
    """Hands out this rank's packed sequences in micro-batches; a background thread packs the next step meanwhile.

    Args:
        packers: this rank's streams: those whose index is ``dp_rank`` modulo ``dp_size``.
        source: name of the data source they read.
        num_streams: streams of the run, a multiple of ``dp_size``.
        dp_rank, dp_size: this rank among those that take different sequences.
        identity: what the order of the data depends on, by configuration field. Saved, and compared when a state is
            loaded: under other values the saved positions would mean other documents.
        digests: of the source's shards, in order: what their content is told from another's by.
        fingerprint: of the shards in the states that earlier versions saved.

    """

    def __init__(
        self,
        packers: dict[int, SequencePacker],
        *,
        source: str,
        num_streams: int,
        dp_rank: int,
        dp_size: int,
        identity: dict[str, int | str | None],
        shards: Sequence[str],
        digests: Sequence[str],
        fingerprint: str,
    ) -> None:
        self._packers, self._num_streams, self._identity = packers, num_streams, identity
        self._source, self._dp_rank, self._dp_size = source, dp_rank, dp_size
        self._shards, self._digests, self._fingerprint = shards, digests, fingerprint
        self._notes: list[str] = []
        self._background = Background()
        self._ready: deque[_Packed] = deque()
        self._length = 0  # of the sequences that are ready
        self._place_at(next_sequence=0)

    def next_micro_batches(self, plan: StepPlan) -> list[MicroBatch]:
        """The micro-batches of one optimizer step of this rank; plans may differ from step to step.

        The next step is packed ahead as this one; what a plan of another length finds packed is packed again.

        Raises:
            ValueError: what went wrong while reading, also when it went wrong in the background; or a plan that asks
                for data from elsewhere.
        """
        if dict(plan.data_weights) != {self._source: 1.0}:
            raise ValueError(
                f"data_weights={dict(plan.data_weights)}: there is one source, {self._source!r}, of weight 1"
            )
        num_micro_batches, size = plan.micro_batches(self._dp_size), plan.micro_batch_size
        count = num_micro_batches * size
        self._background.wait()
        if self._length != plan.sequence_length:
            for stream, state in self._handed_out.items():
                self._packers[stream].load_state_dict(state)
            self._place_at(self._next_sequence)
            self._length = plan.sequence_length
        if len(self._ready) < count:
            self._pack_until(count)
            self._background.wait()
        packed = [self._ready.popleft() for _ in range(count)]
        self._handed_out |= {p.stream: p.state for p in packed}
        self._skipped |= {p.stream: p.skipped for p in packed}
        self._notes += (note for p in packed for note in p.notes)
        self._next_sequence += count * self._dp_size
        self._pack_until(count)
        sequences = (p.sequence for p in packed)
        return [MicroBatch.concatenate(list(islice(sequences, size))) for _ in range(num_micro_batches)]

    @property
    def skipped(self) -> int:
        """Bad documents that this rank's streams passed over since the beginning of the run."""
        return sum(self._skipped.values())

    def take_notes(self) -> list[str]:
        """What the person watching should know about the data handed out or the state loaded since the last call."""
        notes, self._notes = self._notes, []
        return notes

    def state_dict(self) -> dict:
        """What was handed out, whatever was packed ahead: JSON values, a few integers per stream.

        It covers this rank's streams; :func:`merge_states` makes one of all ranks'. The first rank's holds the shards'
        digests as well.
        """
        streams = {str(stream): dict(state) for stream, state in self._handed_out.items()}
        shards = {"shards": list(self._digests)} if self._dp_rank == 0 else {}
        return {"identity": dict(self._identity), "next_row": self._next_sequence, "streams": streams, **shards}

    def load_state_dict(self, state: dict) -> None:
        """Goes on after the sequences that ``state`` says were handed out, whatever the data-parallel size was then.

        Args:
            state: from ``state_dict`` with at least this rank's streams, or from :func:`merge_states`.

        Raises:
            ValueError: when it lacks one of this rank's streams, or was saved under another order of the data.
        """
        if absent := {"identity", "next_row", "streams"} - state.keys():
            raise ConfigError(f"the checkpoint's data position lacks {', '.join(sorted(absent))}; resume from another")
        for name, value in self._identity.items():
            saved = state["identity"].get(name, value)
            if saved != value:
                raise ConfigError(f"{name}={value!r}: the saved data position is for {saved!r}, and means nothing here")
        self._check_shards(state)
        missing = [stream for stream in self._packers if str(stream) not in state["streams"]]
        if missing:
            raise ValueError(f"the saved data position lacks streams {missing}: merge the states of all ranks")
        self._background.stop()
        for stream, packer in self._packers.items():
            packer.load_state_dict(state["streams"][str(stream)])
        self._place_at(state["next_row"])

    def close(self) -> None:
        """Stops packing ahead. The loader can be used again only after ``load_state_dict``."""
        self._background.stop()
        self._ready.clear()

    def _place_at(self, next_sequence: int) -> None:
        self._next_sequence = next_sequence
        self._to_pack = next_sequence + (self._dp_rank - next_sequence) % self._dp_size  # this rank's first from there
        self._ready.clear()
        self._handed_out = {stream: packer.state_dict() for stream, packer in self._packers.items()}
        self._skipped = {stream: packer.stream.skipped for stream, packer in self._packers.items()}

    def _check_shards(self, state: dict) -> None:
        """Refuse other content than the saved position's; shards may have been added at the end."""
        saved = state.get("shards")
        if saved is None:
            name = "fingerprint of the training data's files"
            fingerprint = state["identity"].get(name)
            if fingerprint not in (None, self._fingerprint):
                raise ConfigError(
                    f"{name}: the saved data position is for files of other names or sizes, or in another order"
                )
            self._notes.append(
                "data: the saved position does not say what the files held; only names and sizes were compared"
            )
            return
        for i, digest in enumerate(saved):
            if i == len(self._digests):
                raise ConfigError(
                    f"the training data's files: the saved data position is for {len(saved)}, and here are {i}"
                )
            if digest != self._digests[i]:
                raise ConfigError(
                    f"{self._shards[i]!r}: not file number {i + 1} of the saved data position: its size, head or tail "
                    "differs; files may be added, but only after the others"
                )
        if added := self._shards[len(saved) :]:
            self._notes.append(
                f"data: {len(added)} added after the {len(saved)} files of the saved position, the first {added[0]!r}; "
                "each stream reads what was added from its next epoch on"
            )

    def _pack_until(self, count: int) -> None:
        """Starts packing until ``count`` sequences are ready."""

        def work(stopped: Callable[[], bool]) -> None:
            while len(self._ready) < count and not stopped():
                stream = self._to_pack % self._num_streams
                packer = self._packers[stream]
                sequence = packer.next_sequence(self._length)
                assert sequence is not None, "streams that train repeat for ever"
                documents = packer.stream
                self._ready.append(
                    _Packed(sequence, stream, packer.state_dict(), documents.skipped, documents.take_notes())
                )
                self._to_pack += self._dp_size

        self._background.start(work)


def build_train_loader(
    config: DataConfig, tokenizer: Tokenizer, *, dp_rank: int, dp_size: int, seed: int
) -> SequenceLoader:
    """The loader of one data-parallel rank over the configured training documents.

    Raises:
        ConfigError: when ``data.num_streams`` is not a multiple of ``dp_size``, the data set cannot be opened, a stream
            has no document, or the documents have nothing to predict.
    """
    num_streams = config.num_streams
    if num_streams % dp_size:
        raise ConfigError(
            f"data.num_streams={num_streams}: must be a multiple of the data-parallel size {dp_size}: "
            f"{dp_size}, {2 * dp_size}, {3 * dp_size}, ..."
        )
    source = open_source(config, TRAIN)
    packers = {
        stream: SequencePacker(
            DocumentStream(
                source,
                tokenizer,
                stream=stream,
                num_streams=num_streams,
                seed=seed,
                shuffle_documents=config.shuffle_documents,
            )
        )
        for stream in range(dp_rank, num_streams, dp_size)
    }
    # With fewer shards than streams, the last stream is the first that has no document.
    deals_shards = len(source.shards) >= num_streams
    for stream in packers if deals_shards else [max(packers)]:
        packers[stream].stream.check()
    _check_targets(source, tokenizer)
    identity = {
        "seed": seed,
        "data.source": config.source,
        "data.num_streams": num_streams,
        "data.shuffle_documents": config.shuffle_documents,
        **source.identity,
    }
    return SequenceLoader(
        packers,
        source=config.source,
        num_streams=num_streams,
        dp_rank=dp_rank,
        dp_size=dp_size,
        identity=identity,
        shards=source.shards,
        digests=source.digests(),
        fingerprint=source.fingerprint,
    )


def _check_targets(source: Source, tokenizer: Tokenizer) -> None:
    """Refuse documents of one token each, with which a model learns nothing but to end them."""
    starts = (text[:_CHARACTERS_SAMPLED] for text in islice(source.documents(), _DOCUMENTS_SAMPLED))
    if all(len(ids) <= 2 for start in starts for ids in tokenizer.encode_documents([start])):
        raise ConfigError(
            f"{source.description}: no document (of the first {_DOCUMENTS_SAMPLED}) is longer than one token: there is "
            "nothing to learn but its end; is this the text to train on?"
        )


def merge_states(states: Sequence[dict]) -> dict:
    """One state of the states that all data-parallel ranks saved after the same step.

    Raises:
        ValueError: when they are not of the same step or the same order of the data.
    """
    first = states[0]
    for state in states:
        if (state["identity"], state["next_row"]) != (first["identity"], first["next_row"]):
            raise ValueError(
                f"data positions of different steps or runs: next sequences {[s['next_row'] for s in states]}, "
                f"{[s['identity'] for s in states]}"
            )
    return {**first, "streams": {name: value for state in states for name, value in state["streams"].items()}}
