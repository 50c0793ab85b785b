"""Reading, tokenising and packing in a process beside the trainer's, whose interpreter only launches kernels.

Ranks of one machine that take the same packed sequences (tensor- and context-parallel ones) share a process; each of
them makes the same requests in the same order, and the process does each of them once.
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
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from minimax_train.data.in_process import InProcess, Opened, Packed, Streams
from minimax_train.errors import ConfigError, TrainingError
from minimax_train.parallel.environment import end_with_parent, start_main

_EXIT_TIMEOUT_S = 5.0
_SHOW_STACKS = signal.SIGUSR2


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

    def place(self, states: dict[int, dict]) -> None:
        self.opened()
        while self._pending:
            self._pending -= 1
            self._read()  # what was asked for, or why not
        self._send(("place", states))

    def ask(self, streams: Sequence[int], length: int, weights: Mapping[str, float]) -> None:
        self._pending += 1
        self._send(("pack", list(streams), length, dict(weights)))

    def receive(self) -> Packed:
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
                    os.kill(self._pid, _SHOW_STACKS)  # it writes to stderr where it is
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
            descriptor = listener.fileno()
            process = start_main(__name__, descriptor, num_ranks, stdin=told, pass_fds=[descriptor])
    except OSError as error:
        raise ConfigError(
            f"data.num_workers: no worker can be started with TMPDIR={tempfile.gettempdir()!r}: {error}"
        ) from error
    return Started(folder, process)


def main() -> None:
    """The worker process: file descriptor of the listening socket, number of ranks, process that started it."""
    descriptor, num_ranks, parent = map(int, sys.argv[1:])
    end_with_parent(parent)
    faulthandler.register(_SHOW_STACKS, all_threads=True)
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

    def pack(names: Sequence[int], length: int, weights: Mapping[str, float]) -> Packed:
        assert worker is not None
        worker.ask(names, length, weights)
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
