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

import torch
import torch.distributed as dist

from minimax_train.data.batch import MicroBatch
from minimax_train.data.config import SKIP, TRUNCATE, DataConfig
from minimax_train.data.in_process import InProcess, Opened, Streams, Worker
from minimax_train.data.packing import PackedSequence
from minimax_train.data.saved import (
    EXCLUDES,
    Setting,
    compare_files,
    compare_identity,
    read_again,
    read_state,
    source_of,
)
from minimax_train.data.tokenizer import Tokenizer
from minimax_train.data.worker import WorkerProcess, start_worker
from minimax_train.errors import ConfigError
from minimax_train.recipe import StepPlan


class SequenceLoader:
    """Hands out this rank's packed sequences in micro-batches; worker processes pack the next step meanwhile.

    Args:
        workers: the rank's k-th stream is packed by worker k modulo their number.
        config: of the data.
        dp_rank, dp_size: this rank among those that take different sequences. Its streams are those whose index is
            ``dp_rank`` modulo ``dp_size``.
        identity: what the order of the data depends on, by configuration field, beside what the sources add. Saved,
            and compared when a state is loaded: under other values the saved positions would mean other documents.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        *,
        config: DataConfig,
        dp_rank: int,
        dp_size: int,
        identity: Mapping[str, Setting],
    ) -> None:
        self._workers, self._config, self._settings = workers, config, identity
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._opened: Opened | None = None
        self._notes: list[str] = []
        self._next_sequence = 0
        self._states: dict[int, dict] = {}  # of the streams, after what was handed out
        self._skipped: dict[int, int] = {}  # bad documents, by stream
        self._asked: tuple[int, int, int, dict[str, float]] | None = None  # first sequence, how many, length, weights
        self._error: Exception | None = None

    def open(self) -> str:
        """Waits until the data is open. A fingerprint of the list of files: the same on all ranks, or they see others.

        Raises:
            ConfigError: when it cannot be opened.
        """
        return " ".join(source.fingerprint for source in self._open().sources.values())

    def next_micro_batches(self, plan: StepPlan, following: StepPlan | None = None) -> list[MicroBatch]:
        """The micro-batches of one optimizer step of this rank; plans may differ from step to step.

        The next step is packed ahead, as ``following`` says; what another plan finds packed is packed again.

        Args:
            following: what the step after this one is expected to be; as this one if None.

        Raises:
            ValueError: what went wrong while reading, also when it went wrong in the background; or a plan that asks
                for data from elsewhere.
        """
        num_micro_batches, size = plan.micro_batches(self._dp_size), plan.micro_batch_size
        self._open()
        if self._error is not None:
            raise self._error
        if self._asked != self._request(plan):
            self._place()
            self._ask(plan)
        try:
            sequences = iter(self._receive())
        except Exception as error:  # stays: the workers may be left half-way
            self._error = error
            raise
        self._next_sequence += num_micro_batches * size * self._dp_size
        self._ask(plan if following is None else following)
        return [MicroBatch.concatenate(list(islice(sequences, size))) for _ in range(num_micro_batches)]

    @property
    def skipped(self) -> int:
        """Bad documents that this rank's streams passed over since the beginning of the run."""
        return sum(self._skipped.values())

    def figures(self, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """What the streams of all ranks have served since the beginning of the run, for the metrics.

        Args:
            group: the data-parallel ranks, all of which must call this; None for this one alone.

        Returns:
            ``split_documents``; where they can be other than 0, ``skipped_documents`` and ``truncated_tokens``; by
            source ``data_epoch/NAME``, the mean over the streams; and of several sources ``data_share/NAME`` and
            ``data_share_asked/NAME``, shares of the tokens.
        """
        names = list(self._config.named_sources)
        states = self._states.values()
        sums = [self.skipped, sum(state["split"] for state in states), sum(state["truncated"] for state in states)]
        for name in names:
            for kind in ("asked", "served"):
                sums.append(sum(v for state in states for c, v in state[kind].items() if source_of(c) == name))
            # Of the source's cursors that a stream has, the farthest.
            epochs = ([p["epoch"] for c, p in s["positions"].items() if source_of(c) == name] for s in states)
            sums.append(sum(max(epoch, default=0) for epoch in epochs))
        total = torch.tensor(sums, dtype=torch.float64)
        if group is not None:
            dist.all_reduce(total, group=group)
        skipped, split, truncated, *by_source = total.tolist()
        asked, served, epochs = (dict(zip(names, by_source[i::3], strict=True)) for i in range(3))
        figures = {f"data_epoch/{name}": epochs[name] / self._config.num_streams for name in names}
        for kind, tokens in {"data_share": served, "data_share_asked": asked}.items():
            if len(names) > 1 and (all_tokens := sum(tokens.values())):
                figures |= {f"{kind}/{name}": count / all_tokens for name, count in tokens.items()}
        figures["split_documents"] = int(split)
        if self._config.packing == TRUNCATE:
            figures["truncated_tokens"] = int(truncated)
        if self._config.bad_documents == SKIP:
            figures["skipped_documents"] = int(skipped)
        return figures

    def take_notes(self) -> list[str]:
        """What the person watching should know about the data handed out or the state loaded since the last call."""
        notes, self._notes = self._notes, []
        return notes

    def state_dict(self) -> dict:
        """What was handed out, whatever was packed ahead: JSON values, some numbers per stream and component.

        It covers this rank's streams; :func:`merge_states` makes one of all ranks'. The first rank's holds the files'
        digests as well.
        """
        opened = self._open()
        streams = {str(stream): state for stream, state in self._states.items()}
        digests = {name: list(s.digests) for name, s in opened.sources.items() if s.digests is not None}
        shards = {"shards": digests} if digests else {}
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
        self._notes += compare_identity(self._identity(), state["identity"])
        self._notes += compare_files(opened.sources, state)
        missing = [stream for stream in self._states if str(stream) not in state["streams"]]
        if missing:
            raise ValueError(f"the saved data position lacks streams {missing}: merge the states of all ranks")
        read = {stream: read_state(state["streams"][str(stream)], stream, opened.sources) for stream in self._states}
        self._notes += read_again(read.values(), opened.sources)
        self._states = read
        self._skipped = {
            stream: sum(position["skipped"] for position in saved["positions"].values())
            for stream, saved in read.items()
        }
        self._next_sequence = state["next_row"]
        self._place()

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

    def _identity(self) -> dict[str, Setting]:
        sources = self._open().sources.values()
        return {**self._settings, **{name: value for s in sources for name, value in s.identity.items()}}

    def _place(self) -> None:
        """Tells the workers to go on after what was handed out."""
        for worker in self._workers:
            streams = (stream for stream in self._states if self._worker_of(stream) is worker)
            worker.place({stream: self._states[stream] for stream in streams})
        self._asked = self._error = None

    def _request(self, plan: StepPlan) -> tuple[int, int, int, dict[str, float]]:
        unknown = [name for name in plan.data_weights if source_of(name) not in self._config.named_sources]
        if unknown or not any(weight > 0 for weight in plan.data_weights.values()):
            names = ", ".join(self._config.named_sources)
            raise ValueError(f"data_weights={dict(plan.data_weights)}: the sources are {names}, and one must have some")
        count = plan.micro_batches(self._dp_size) * plan.micro_batch_size
        return self._next_sequence, count, plan.sequence_length, dict(plan.data_weights)

    def _ask(self, plan: StepPlan) -> None:
        self._asked = self._request(plan)
        streams, (_, _, length, weights) = self._streams_asked(), self._asked
        for worker in self._workers:
            worker.ask([stream for stream in streams if self._worker_of(stream) is worker], length, weights)

    def _receive(self) -> list[PackedSequence]:
        """What was asked for, in the order of the run."""
        packed = [worker.receive() for worker in self._workers]
        sequences = {id(w): iter(p.sequences) for w, p in zip(self._workers, packed, strict=True)}
        received = [next(sequences[id(self._worker_of(stream))]) for stream in self._streams_asked()]
        for answer in packed:
            self._states |= answer.states
            self._skipped |= answer.skipped
            self._notes += answer.notes
        return received

    def _streams_asked(self) -> list[int]:
        assert self._asked is not None
        next_sequence, count, *_ = self._asked
        mine = next_sequence + (self._dp_rank - next_sequence) % self._dp_size  # this rank's first from there
        return [(mine + i * self._dp_size) % self._config.num_streams for i in range(count)]

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
    identity: dict[str, Setting] = {
        "seed": seed,
        "data.num_streams": num_streams,
        "data.shuffle_documents": config.shuffle_documents,
        "data.medium_length": config.medium_length,
        "data.long_length": config.long_length,
        EXCLUDES: config.exclude_held_out and config.has_validation,
        **{f"{config.path_of(name)}.source": source.source for name, source in config.named_sources.items()},
    }
    return SequenceLoader(workers, config=config, dp_rank=dp_rank, dp_size=dp_size, identity=identity)


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
