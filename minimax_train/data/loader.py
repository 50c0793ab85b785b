"""The training loader: packed sequences dealt from the streams to the data-parallel ranks, packed one step ahead.

Sequence g of the run comes from stream g modulo the number of streams and belongs to rank g modulo the data-parallel
size.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch.distributed as dist

from minimax_train.data.batch import MicroBatch
from minimax_train.data.config import DataConfig
from minimax_train.data.tokenizer import Tokenizer
from minimax_train.data.worker import InProcess, Opened, Packed, Streams, Worker, WorkerProcess, start_worker
from minimax_train.errors import ConfigError
from minimax_train.recipe import StepPlan


class SequenceLoader:
    """Hands out this rank's packed sequences in micro-batches; worker processes pack the next step meanwhile.

    Args:
        workers: the rank's k-th stream is packed by worker k modulo their number.
        source: name of the data source they read.
        num_streams: streams of the run, a multiple of ``dp_size``. This rank's are those whose index is ``dp_rank``
            modulo ``dp_size``.
        dp_rank, dp_size: this rank among those that take different sequences.
        identity: what the order of the data depends on, by configuration field, beside what the source adds. Saved,
            and compared when a state is loaded: under other values the saved positions would mean other documents.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        *,
        source: str,
        num_streams: int,
        dp_rank: int,
        dp_size: int,
        identity: Mapping[str, int | str | None],
    ) -> None:
        self._workers, self._num_streams, self._settings = workers, num_streams, identity
        self._source, self._dp_rank, self._dp_size = source, dp_rank, dp_size
        self._opened: Opened | None = None
        self._notes: list[str] = []
        self._next_sequence = 0
        self._states: dict[int, dict[str, int]] = {}  # of the streams, after what was handed out
        self._skipped: dict[int, int] = {}  # bad documents, by stream
        self._asked: tuple[int, int, int] | None = None  # first sequence, how many, their length
        self._error: Exception | None = None

    def open(self) -> str:
        """Waits until the data is open. A fingerprint of the list of files: the same on all ranks, or they see others.

        Raises:
            ConfigError: when it cannot be opened.
        """
        return self._open().fingerprint

    def next_micro_batches(self, plan: StepPlan, following: StepPlan | None = None) -> list[MicroBatch]:
        """The micro-batches of one optimizer step of this rank; plans may differ from step to step.

        The next step is packed ahead, as ``following`` says; what another plan finds packed is packed again.

        Args:
            following: what the step after this one is expected to be; as this one if None.

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
        self._open()
        if self._error is not None:
            raise self._error
        if self._asked != (self._next_sequence, count, plan.sequence_length):
            self._place()
            self._ask(count, plan.sequence_length)
        try:
            packed = self._receive()
        except Exception as error:  # stays: the workers may be left half-way
            self._error = error
            raise
        self._next_sequence += count * self._dp_size
        ahead = plan if following is None else following
        self._ask(ahead.micro_batches(self._dp_size) * ahead.micro_batch_size, ahead.sequence_length)
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
        opened = self._open()
        streams = {str(stream): dict(state) for stream, state in self._states.items()}
        shards = {} if opened.digests is None else {"shards": list(opened.digests)}
        return {"identity": self._identity(), "next_row": self._next_sequence, "streams": streams, **shards}

    def load_state_dict(self, state: dict) -> None:
        """Goes on after the sequences that ``state`` says were handed out, whatever the data-parallel size was then.

        Args:
            state: from ``state_dict`` with at least this rank's streams, or from :func:`merge_states`.

        Raises:
            ValueError: when it lacks one of this rank's streams, or was saved under another order of the data.
        """
        opened = self._open()
        if absent := {"identity", "next_row", "streams"} - state.keys():
            raise ConfigError(f"the checkpoint's data position lacks {', '.join(sorted(absent))}; resume from another")
        for name, value in self._identity().items():
            saved = state["identity"].get(name, value)
            if saved != value:
                raise ConfigError(f"{name}={value!r}: the saved data position is for {saved!r}, and means nothing here")
        self._notes += compare_shards(opened, state)
        self._check_positions(state["streams"])
        missing = [stream for stream in self._states if str(stream) not in state["streams"]]
        if missing:
            raise ValueError(f"the saved data position lacks streams {missing}: merge the states of all ranks")
        self._states = {stream: state["streams"][str(stream)] for stream in self._states}
        # Earlier versions did not count them.
        self._skipped = {stream: state.get("skipped", 0) for stream, state in self._states.items()}
        self._next_sequence = state["next_row"]
        self._place()

    def _check_positions(self, streams: dict[str, dict[str, int]]) -> None:
        """Refuse positions of this rank's streams that cannot be."""
        opened = self._open()
        for stream, first in opened.states.items():
            position = {**first, **streams.get(str(stream), {})}  # earlier versions saved fewer numbers
            fits = set(position) == set(first)
            fits &= all(type(value) is int and value >= 0 for value in position.values())
            if not fits:
                raise ConfigError(f"damaged: no position in the training data: stream {stream}: {position}")
            if position["num_shards"] > len(opened.shards):
                raise ConfigError(
                    f"the training data's files: the saved data position is for {position['num_shards']}, and here are "
                    f"{len(opened.shards)}"
                )

    def close(self) -> None:
        """Ends the worker processes."""
        for worker in self._workers:
            worker.leave()
        for worker in self._workers:
            worker.close()

    def _open(self) -> Opened:
        """Waits until the workers have opened the data."""
        if self._opened is None:
            every = [worker.opened() for worker in self._workers]
            self._states = {stream: state for opened in every for stream, state in opened.states.items()}
            self._opened = every[0]
        return self._opened

    def _identity(self) -> dict[str, int | str | None]:
        return {**self._settings, **self._open().identity}

    def _place(self) -> None:
        """Tells the workers to go on after what was handed out."""
        for worker in self._workers:
            streams = (stream for stream in self._states if self._worker_of(stream) is worker)
            worker.place({stream: self._states[stream] for stream in streams})
        self._asked = self._error = None

    def _ask(self, count: int, length: int) -> None:
        self._asked = self._next_sequence, count, length
        streams = self._streams_asked()
        for worker in self._workers:
            worker.ask([stream for stream in streams if self._worker_of(stream) is worker], length)

    def _receive(self) -> list[Packed]:
        """What was asked for, in the order of the run."""
        packed = {id(worker): iter(worker.receive()) for worker in self._workers}
        received = [(stream, next(packed[id(self._worker_of(stream))])) for stream in self._streams_asked()]
        self._states |= {stream: p.state for stream, p in received}
        self._skipped |= {stream: p.skipped for stream, p in received}
        self._notes += (note for _, p in received for note in p.notes)
        return [p for _, p in received]

    def _streams_asked(self) -> list[int]:
        assert self._asked is not None
        next_sequence, count, _ = self._asked
        mine = next_sequence + (self._dp_rank - next_sequence) % self._dp_size  # this rank's first from there
        return [(mine + i * self._dp_size) % self._num_streams for i in range(count)]

    def _worker_of(self, stream: int) -> Worker:
        return self._workers[stream // self._dp_size % len(self._workers)]


def build_train_loader(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    dp_rank: int,
    dp_size: int,
    seed: int,
    peers: dist.ProcessGroup | None = None,
    timeout_s: float = 600.0,
) -> SequenceLoader:
    """The loader of one data-parallel rank over the configured training documents.

    Args:
        peers: the ranks that take the same sequences, this one among them; None for this one alone. Those on one
            machine share ``data.num_workers`` processes, which the first of them starts.
        timeout_s: seconds after which a worker process that gives nothing is taken to hang.

    Raises:
        ConfigError: when ``data.num_streams`` is not a multiple of ``dp_size``. That the data set cannot be opened is
            raised by the loader's methods.
    """
    num_streams = config.num_streams
    if num_streams % dp_size:
        raise ConfigError(
            f"data.num_streams={num_streams}: must be a multiple of the data-parallel size {dp_size}: "
            f"{dp_size}, {2 * dp_size}, {3 * dp_size}, ..."
        )
    mine = range(dp_rank, num_streams, dp_size)
    digests = dp_rank == 0  # one rank looks into all files, not a thousand
    if config.num_workers:
        dealt = [
            Streams(config, tokenizer, seed, mine[i :: config.num_workers], digests=digests and i == 0)
            for i in range(config.num_workers)
        ]
        workers: Sequence[Worker] = _share(dealt, peers, timeout_s)
    else:
        workers = [InProcess(Streams(config, tokenizer, seed, mine, digests))]
    identity = {
        "seed": seed,
        "data.source": config.source,
        "data.num_streams": num_streams,
        "data.shuffle_documents": config.shuffle_documents,
    }
    return SequenceLoader(
        workers, source=config.source, num_streams=num_streams, dp_rank=dp_rank, dp_size=dp_size, identity=identity
    )


def compare_shards(opened: Opened, state: dict) -> list[str]:
    """Refuse other content than a saved position's; shards may have been added at the end. What there is to say of it.

    Raises:
        ConfigError: naming the file that differs.
    """
    saved, digests = state.get("shards"), opened.digests
    if digests is None:  # another rank compares
        return []
    if saved is None:
        name = "fingerprint of the training data's files"
        fingerprint = state["identity"].get(name)
        if fingerprint not in (None, opened.fingerprint):
            raise ConfigError(
                f"{name}: the saved data position is for files of other names or sizes, or in another order"
            )
        return ["data: the saved position does not say what the files held; only names and sizes were compared"]
    for i, digest in enumerate(saved):
        if i == len(digests):
            raise ConfigError(
                f"the training data's files: the saved data position is for {len(saved)}, and here are {i}"
            )
        if digest != digests[i]:
            raise ConfigError(
                f"{opened.shards[i]!r}: not file number {i + 1} of the saved data position: its size, head or tail "
                "differs; files may be added, but only after the others"
            )
    added = opened.shards[len(saved) :]
    if not added:
        return []
    return [
        f"data: {len(added)} added after the {len(saved)} files of the saved position, the first {added[0]!r}; "
        "each stream reads what was added from its next epoch on"
    ]


def _share(dealt: Sequence[Streams], peers: dist.ProcessGroup | None, timeout_s: float) -> list[WorkerProcess]:
    """Connections to worker processes, started by the first of the peers on each machine."""
    rank, size = (0, 1) if peers is None else (dist.get_rank(peers), dist.get_world_size(peers))
    machine = socket.gethostname(), _boot_id()
    machines = _told(machine, peers, size)
    here = [peer for peer in range(size) if machines[peer] == machine]
    started = [start_worker(streams, len(here)) for streams in dealt] if rank == here[0] else []
    addresses = _told([worker.address for worker in started], peers, size)[here[0]]
    processes = [worker.process for worker in started] or [None] * len(dealt)
    connected = [
        WorkerProcess(address, process, timeout_s) for address, process in zip(addresses, processes, strict=True)
    ]
    _told(None, peers, size)
    for worker in started:
        worker.forget_address()
    return connected


def _boot_id() -> str:
    """Tells machines apart that call themselves alike, as containers may."""
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text() if file.is_file() else ""


def _told(said: Any, peers: dist.ProcessGroup | None, size: int) -> list[Any]:
    """What each of the peers said."""
    told: list[Any] = [said] * size
    if size > 1:
        dist.all_gather_object(told, said, group=peers)
    return told


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
