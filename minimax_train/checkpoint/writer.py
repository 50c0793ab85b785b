"""The process beside each rank that writes its part of a checkpoint from staging memory, and the rank's end of it."""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.distributed.checkpoint.planner import WriteItem

from minimax_train.checkpoint.remote import Folder
from minimax_train.checkpoint.shards import Written, write_shards
from minimax_train.checkpoint.staging import Place, staged
from minimax_train.checkpoint.store import CheckpointStore
from minimax_train.errors import one_line
from minimax_train.parallel.environment import end_with_parent, start_main

_EXIT_TIMEOUT_S = 5.0


class Failure(Exception):
    """Work on a checkpoint that failed, for the reason that the message gives in a line."""


class WriterProcess:
    """One rank's writer, started at once; it ends with the thread that started it.

    Args:
        descriptor: of staging memory.
        size: of staging memory, in bytes.
        rank: whose files it writes.

    Raises:
        OSError: when it cannot be started.
    """

    def __init__(self, descriptor: int, size: int, rank: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = start_main(
                __name__,
                *(theirs.fileno(), descriptor, size, rank),
                environ={"OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), descriptor],
            )
        self._connection = Connection(ours.detach())
        self._is_ready = False

    def ask(self, kind: str, *arguments: Any) -> None:
        """Have it do something; :meth:`answers` tells when it is done.

        Args:
            kind, arguments: ``plan``, what it writes from now on, which is not answered; ``write``, the draft and the
                places of what is written, answered by :func:`write_shards`; ``finish``, as
                :meth:`CheckpointStore.finish` with the store.
        """
        with suppress(OSError):  # the process ended: the answer says so
            self._connection.send((kind, *arguments))

    def answers(self) -> bool:
        """Whether :meth:`answer` will not wait."""
        try:
            return self._connection.poll()
        except OSError:
            return True

    def answer(self) -> Any:
        """The result of what was asked first.

        Raises:
            Failure: when it failed, or the process ended.
        """
        try:
            done, result = self._connection.recv()
        except (EOFError, OSError):
            raise Failure(self._end()) from None
        if not done:
            raise Failure(result)
        return result

    @property
    def is_ready(self) -> bool:
        """Whether it has come so far as to take requests."""
        if not self._is_ready and self.ended is None and self.answers():
            with suppress(Failure):
                self.answer()
                self._is_ready = True
        return self._is_ready

    @property
    def ended(self) -> str | None:
        """How the process ended, if it did."""
        return None if self.process.poll() is None else self._end()

    def close(self) -> None:
        """End it, whatever it does."""
        self._connection.close()
        self.process.kill()
        self.process.wait()

    def _end(self) -> str:
        name = f"checkpoint writer {self.process.pid}"
        try:
            status = self.process.wait(_EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return f"{name} closed its connection"
        if status < 0:
            memory = "; out of memory?" if -status == signal.SIGKILL else ""
            return f"{name} was ended by {signal.Signals(-status).name}{memory}"
        return f"{name} ended with status {status}"


def attempt(work: Callable[..., Any], *arguments: Any) -> tuple[bool, Any]:
    """Whether some work was done, and its result, or why not in a line."""
    try:
        return True, work(*arguments)
    except Exception as error:  # training goes on, whatever it is
        return False, (isinstance(error, OSError) and error.strerror) or one_line(error)


def main() -> None:
    """The writer process: file descriptors of the connection and of staging memory, its size, rank, and the process
    that started it."""
    descriptor, memory, size, rank, parent = map(int, sys.argv[1:])
    end_with_parent(parent)  # and not before
    faulthandler.enable()
    os.nice(10)  # threads that launch kernels go first
    torch.set_num_threads(1)
    items: list[WriteItem] = []
    shared: mmap.mmap | None = None  # once it is allocated

    def write(folder: Folder, places: list[Place]) -> Written:
        assert shared is not None
        return write_shards(folder, rank, items, [staged(shared, place) for place in places])

    with Connection(descriptor) as connection:
        connection.send((True, os.getpid()))
        while True:
            try:
                kind, *arguments = connection.recv()
            except (EOFError, OSError):
                return
            if kind == "plan":
                (items,) = arguments
                continue
            if shared is None:
                shared = mmap.mmap(memory, size)
            connection.send(attempt(write if kind == "write" else CheckpointStore.finish, *arguments))
