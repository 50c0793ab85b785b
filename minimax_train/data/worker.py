"""Reading, tokenising and packing: in the trainer's process, or in a process beside it.

In a process of its own it does not hold the interpreter that launches kernels. Ranks of one machine that take the same
packed sequences (tensor- and context-parallel ones) share a process; each of them makes the same requests in the same
order, and the process does each of them once.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from minimax_train.data.config import DataConfig
from minimax_train.data.packing import PackedSequence, SequencePacker
from minimax_train.data.sources import TRAIN, Source, open_source
from minimax_train.data.streams import DocumentStream
from minimax_train.data.tokenizer import Tokenizer
from minimax_train.errors import ConfigError, TrainingError
from minimax_train.parallel.environment import end_with_parent

_DOCUMENTS_SAMPLED, _CHARACTERS_SAMPLED = 1000, 1000
_EXIT_TIMEOUT_S = 5.0


@dataclass(frozen=True, eq=False)
class Packed:
    """A packed sequence, and of its stream: the state after it, the bad documents passed over since the beginning of
    the run, and what there is to say of them."""

    sequence: PackedSequence
    state: dict[str, int]
    skipped: int
    notes: list[str]


@dataclass(frozen=True)
class Streams:
    """Which of a run's streams to pack, and out of what; what a worker process is sent.

    Attributes:
        digests: whether to look into all shards for their digests.
    """

    config: DataConfig
    tokenizer: Tokenizer
    seed: int
    streams: Sequence[int]
    digests: bool


@dataclass(frozen=True)
class Opened:
    """What opening the data set told.

    Attributes:
        states: of the streams at the beginning.
        shards: the source's, by name.
        digests: what each shard's content is told from another's by; None where nobody asked for them.
        identity: what the documents depend on besides the shards' content, by configuration field.
        fingerprint: of the shards in the states that earlier versions saved.
    """

    states: dict[int, dict[str, int]]
    shards: Sequence[str]
    digests: Sequence[str] | None
    identity: Mapping[str, str | None]
    fingerprint: str


class Worker(Protocol):
    """Packs some of a rank's streams. One request for sequences is under way at a time."""

    def opened(self) -> Opened:
        """Wait until the data set is open.

        Raises:
            ConfigError: when it cannot be opened.
        """
        ...

    def place(self, states: dict[int, dict[str, int]]) -> None:
        """Go on from other positions, by stream; what was asked for is dropped."""
        ...

    def ask(self, streams: Sequence[int], length: int) -> None:
        """Ask for the next sequence of ``length`` tokens of each of these streams, one after the other."""
        ...

    def receive(self) -> list[Packed]:
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
        self._asked: tuple[Sequence[int], int] | None = None

    def opened(self) -> Opened:
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def _open(self) -> Opened:
        config, tokenizer, source = (
            self._streams.config,
            self._streams.tokenizer,
            open_source(self._streams.config, TRAIN),
        )
        for stream in self._streams.streams:
            documents = DocumentStream(
                source,
                tokenizer,
                stream=stream,
                num_streams=config.num_streams,
                seed=self._streams.seed,
                shuffle_documents=config.shuffle_documents,
            )
            self._packers[stream] = SequencePacker(documents)
        # With fewer shards than streams, the last stream is the first that has no document.
        deals_shards = len(source.shards) >= config.num_streams
        for stream in self._packers if deals_shards else [max(self._packers)]:
            self._packers[stream].stream.check()
        _check_targets(source, tokenizer)
        states = {stream: packer.state_dict() for stream, packer in self._packers.items()}
        digests = source.digests() if self._streams.digests else None
        return Opened(states, source.shards, digests, source.identity, source.fingerprint)

    def place(self, states: dict[int, dict[str, int]]) -> None:
        for stream, state in states.items():
            self._packers[stream].load_state_dict(state)
        self._asked = None

    def ask(self, streams: Sequence[int], length: int) -> None:
        self._asked = streams, length

    def receive(self) -> list[Packed]:
        assert self._asked is not None, "nothing was asked for"
        streams, length = self._asked
        packed = [self._pack(stream, length) for stream in streams]
        self._asked = None
        return packed

    def _pack(self, stream: int, length: int) -> Packed:
        packer = self._packers[stream]
        sequence = packer.next_sequence(length)
        assert sequence is not None, "streams that train repeat for ever"
        return Packed(sequence, packer.state_dict(), packer.stream.skipped, packer.stream.take_notes())

    def leave(self) -> None:
        pass

    def close(self) -> None:
        pass


def _check_targets(source: Source, tokenizer: Tokenizer) -> None:
    """Refuse documents of one token each, with which a model learns nothing but to end them."""
    starts = (text[:_CHARACTERS_SAMPLED] for text in islice(source.documents(), _DOCUMENTS_SAMPLED))
    if all(len(ids) <= 2 for start in starts for ids in tokenizer.encode_documents([start])):
        raise ConfigError(
            f"{source.description}: no document (of the first {_DOCUMENTS_SAMPLED}) is longer than one token: there is "
            "nothing to learn but its end; is this the text to train on?"
        )


class WorkerProcess:
    """One rank's connection to a worker process.

    Args:
        address: of the socket that the process accepts connections at.
        process: the process, on the rank that started it.
        timeout_s: seconds after which a worker that does not answer is taken to hang.
    """

    def __init__(self, address: str, process: subprocess.Popen | None, timeout_s: float) -> None:
        self._process, self._timeout_s, self._pending = process, timeout_s, 0
        client = socket.socket(socket.AF_UNIX)
        with suppress(OSError):  # the process ended: the first answer says so
            client.connect(address)
        self._connection = Connection(client.detach())
        self._opened: Opened | None = None
        self._pid = 0

    def opened(self) -> Opened:
        if self._opened is None:
            self._pid, self._opened = self._answer()
        return self._opened

    def place(self, states: dict[int, dict[str, int]]) -> None:
        self.opened()
        while self._pending:
            self._pending -= 1
            self._read()  # what was asked for, or why not
        self._send(("place", states))

    def ask(self, streams: Sequence[int], length: int) -> None:
        self._pending += 1
        self._send(("pack", list(streams), length))

    def receive(self) -> list[Packed]:
        self._pending -= 1
        return self._answer()

    def leave(self) -> None:
        self._connection.close()

    def close(self) -> None:
        if self._process is not None:
            try:
                self._process.wait(_EXIT_TIMEOUT_S)
            except subprocess.TimeoutExpired:  # it reads something that does not come
                self._process.kill()
                self._process.wait()

    def _send(self, request: tuple) -> None:
        with suppress(OSError):  # the process ended: the next answer says so
            self._connection.send(request)

    def _read(self) -> tuple[str, Any]:
        try:
            if not self._connection.poll(self._timeout_s):
                if self._pid:
                    os.kill(self._pid, signal.SIGUSR1)  # it writes to stderr where it is
                where = "; above is where it was" if self._pid else ""
                waited = f"gave no answer for {self._timeout_s:g} s (parallel.timeout_s){where}"
                raise _on_this_rank(f"{self._name} {waited}")
            return self._connection.recv()
        except (EOFError, OSError):
            raise _on_this_rank(f"{self._name} {self._end()}") from None

    def _answer(self) -> Any:
        kind, content = self._read()
        if kind == "refused":
            raise ConfigError(content)
        if kind == "failed":
            raise _on_this_rank(f"{self._name} failed:\n{content}")
        return content

    @property
    def _name(self) -> str:
        return f"data worker {self._pid}" if self._pid else "a data worker"

    def _end(self) -> str:
        if self._process is None:
            return "ended before this rank was done"
        try:
            status = self._process.wait(_EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        if status < 0:
            memory = "; out of memory?" if -status == signal.SIGKILL else ""
            return f"was ended by {signal.Signals(-status).name}{memory}"
        return f"ended with status {status}"


def _on_this_rank(message: str) -> TrainingError:
    error = TrainingError(message)
    error.on_all_ranks = False
    return error


@dataclass(frozen=True, eq=False)
class Started:
    """A worker process that was started: where the ranks connect."""

    folder: Path
    process: subprocess.Popen

    @property
    def address(self) -> str:
        return str(self.folder / "socket")

    def forget_address(self) -> None:
        """Once all ranks are connected."""
        shutil.rmtree(self.folder, ignore_errors=True)


def start_worker(streams: Streams, num_ranks: int) -> Started:
    """Start a process that packs streams for as many ranks of this machine. It ends with the process that started it.

    Raises:
        ConfigError: when it cannot be started, or the folder for temporary files takes no socket.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix="minimax-train-"))
        with socket.socket(socket.AF_UNIX) as listener, tempfile.TemporaryFile() as told:
            listener.bind(str(folder / "socket"))
            listener.listen(num_ranks)
            pickle.dump(streams, told)
            told.seek(0)
            arguments = [str(listener.fileno()), str(num_ranks), str(os.getpid())]
            # Ctrl-C goes to all processes of a terminal, also to one that is still being imported.
            start = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); from {__name__} import main; main()"
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", start, *arguments],
                stdin=told,
                pass_fds=[listener.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
    except OSError as error:
        raise ConfigError(
            f"data.num_workers: no worker can be started with TMPDIR={tempfile.gettempdir()!r}: {error}"
        ) from error
    return Started(folder, process)


def main() -> None:
    """The worker process: file descriptor of the listening socket, number of ranks, process that started it."""
    descriptor, num_ranks, parent = map(int, sys.argv[1:])
    end_with_parent(parent)  # and not before: a SIGTERM to the whole job is the trainer's to answer
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    os.nice(10)  # threads that launch kernels go first
    streams = pickle.load(sys.stdin.buffer)
    with socket.socket(fileno=descriptor) as listener:
        connections = [Connection(listener.accept()[0].detach()) for _ in range(num_ranks)]
    serve(streams, connections)


def serve(streams: Streams, connections: Iterable[Connection]) -> None:
    """Answer requests until every rank has closed its connection.

    The answer to a rank's n-th request is sent when all ranks have made theirs: one that is still at the step before
    reads that step's first, and never waits for a rank that does not read yet.
    """
    worker: InProcess | None = None

    def open_streams() -> tuple[int, Opened]:
        nonlocal worker
        worker = InProcess(streams)
        return os.getpid(), worker.opened()

    def pack(names: Sequence[int], length: int) -> list[Packed]:
        assert worker is not None
        worker.ask(names, length)
        return worker.receive()

    made = dict.fromkeys(connections, 0)  # requests, by connection

    def send(answer: tuple[str, Any]) -> None:
        for connection in list(made):
            try:
                connection.send(answer)
            except OSError:  # closed by its rank
                del made[connection]

    first = _attempt(open_streams)
    send(first)
    if first[0] != "done":
        return
    answers: deque[tuple[str, Any] | None] = deque()
    started = answered = 0  # requests
    while made:
        for connection in wait(list(made)):
            assert isinstance(connection, Connection)
            try:
                kind, *arguments = connection.recv()
            except (EOFError, OSError):
                del made[connection]
                continue
            made[connection] += 1
            if made[connection] <= started:
                continue
            started += 1
            if kind == "place":
                assert worker is not None
                worker.place(*arguments)
                answers.append(None)
            else:
                answers.append(_attempt(pack, *arguments))
        while made and answered < min(made.values()):
            answer = answers.popleft()
            answered += 1
            if answer is not None:
                send(answer)


def _attempt(work: Any, *arguments: Any) -> tuple[str, Any]:
    try:
        return "done", work(*arguments)
    except ConfigError as error:
        return "refused", str(error)
    except Exception:
        return "failed", traceback.format_exc().rstrip()
