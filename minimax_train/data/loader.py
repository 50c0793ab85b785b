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
from minimax_train.data.sources import TRAIN, open_source
from minimax_train.data.streams import DocumentStream
from minimax_train.data.tokenizer import Tokenizer
from minimax_train.errors import ConfigError
from minimax_train.recipe import StepPlan


@dataclass(frozen=True, eq=False)
class _Packed:
    sequence: PackedSequence
    stream: int
    state: dict[str, int]  # the stream's, after this sequence


class SequenceLoader:
    """Hands out this rank's packed sequences in micro-batches; a background thread packs the next step meanwhile.

    Args:
        packers: this rank's streams: those whose index is ``dp_rank`` modulo ``dp_size``.
        source: name of the data source they read.
        num_streams: streams of the run, a multiple of ``dp_size``.
        dp_rank, dp_size: this rank among those that take different sequences.
        identity: what the order of the data depends on, by configuration field. Saved, and compared when a state is
            loaded: under other values the saved positions would mean other documents.
    """

    def __init__(
        self,
        packers: dict[int, SequencePacker],
        *,
        source: str,
        num_streams: int,
        dp_rank: int,
        dp_size: int,
        identity: dict[str, int | str],
    ) -> None:
        self._packers, self._num_streams, self._identity = packers, num_streams, identity
        self._source, self._dp_rank, self._dp_size = source, dp_rank, dp_size
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
        self._next_sequence += count * self._dp_size
        self._pack_until(count)
        sequences = (p.sequence for p in packed)
        return [MicroBatch.concatenate(list(islice(sequences, size))) for _ in range(num_micro_batches)]

    def state_dict(self) -> dict:
        """What was handed out, whatever was packed ahead: JSON values, a few integers per stream.

        It covers this rank's streams; :func:`merge_states` makes one of all ranks'.
        """
        streams = {str(stream): dict(state) for stream, state in self._handed_out.items()}
        return {"identity": dict(self._identity), "next_row": self._next_sequence, "streams": streams}

    def load_state_dict(self, state: dict) -> None:
        """Goes on after the sequences that ``state`` says were handed out, whatever the data-parallel size was then.

        Args:
            state: from ``state_dict`` with at least this rank's streams, or from :func:`merge_states`.

        Raises:
            ValueError: when it lacks one of this rank's streams, or was saved under another order of the data.
        """
        for name, value in self._identity.items():
            saved = state["identity"].get(name)
            if saved != value:
                raise ConfigError(f"{name}={value!r}: the saved data position is for {saved!r}, and means nothing here")
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

    def _pack_until(self, count: int) -> None:
        """Starts packing until ``count`` sequences are ready."""

        def work(stopped: Callable[[], bool]) -> None:
            while len(self._ready) < count and not stopped():
                stream = self._to_pack % self._num_streams
                packer = self._packers[stream]
                sequence = packer.next_sequence(self._length)
                assert sequence is not None, "streams that train repeat for ever"
                self._ready.append(_Packed(sequence, stream, packer.state_dict()))
                self._to_pack += self._dp_size

        self._background.start(work)


def build_train_loader(
    config: DataConfig, tokenizer: Tokenizer, *, dp_rank: int, dp_size: int, seed: int
) -> SequenceLoader:
    """The loader of one data-parallel rank over the configured training documents.

    Raises:
        ConfigError: when ``data.num_streams`` is not a multiple of ``dp_size``, or the data set cannot be opened.
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
    identity = {
        "seed": seed,
        "data.num_streams": num_streams,
        "data.shuffle_documents": config.shuffle_documents,
        "fingerprint of the training data's files": source.fingerprint,
    }
    return SequenceLoader(
        packers, source=config.source, num_streams=num_streams, dp_rank=dp_rank, dp_size=dp_size, identity=identity
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
