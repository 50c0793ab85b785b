"""``minimax-train`` in a process of its own that need not import anything: a fork of the test's."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets  # noqa: F401  imported here once, not by every fork
import matplotlib.figure  # noqa: F401
import torch
import torch._dynamo

import minimax_train.trainer
from minimax_train.cli import main


class Finished(NamedTuple):
    """What became of a command. A status below 0 is the signal that killed it."""

    status: int
    out: str
    err: str


class Command:
    """A started ``minimax-train``, in a folder.

    Args:
        prepare: called in the new process first.
    """

    def __init__(self, folder: Path, arguments: Sequence[str], prepare: Callable[[], object] = lambda: None) -> None:
        self._output = [folder / f"std{name}-{time.monotonic_ns()}" for name in ("out", "err")]
        self.process = multiprocessing.get_context("fork").Process(target=self._run, args=(folder, arguments, prepare))
        self.process.start()

    def _run(self, folder: Path, arguments: Sequence[str], prepare: Callable[[], object]) -> None:
        os.chdir(folder)
        for descriptor, path in zip((1, 2), self._output, strict=True):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
        # pytest has put its own in their place.
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
        torch.set_num_threads(1)  # OpenMP's other threads stayed with the parent: a loop shared with them never ends
        prepare()
        status = main(list(arguments))
        sys.stdout.flush()
        os._exit(status)

    def wait_for_lines(self, file: Path, count: int) -> None:
        deadline = time.monotonic() + 60
        while not file.exists() or file.read_text().count("\n") < count:
            assert self.process.is_alive() and time.monotonic() < deadline, self.finish()
            time.sleep(0.02)

    def finish(self, timeout_s: float = 60) -> Finished:
        self.process.join(timeout_s)
        hung = self.process.is_alive()
        self.process.kill()
        self.process.join()
        out, err = (path.read_text() if path.exists() else "" for path in self._output)
        assert not hung, f"still ran after {timeout_s} s:\n{out}\n{err}"
        return Finished(self.process.exitcode or 0, out, err)


def minimax_train(folder: Path, *arguments: str, prepare: Callable[[], object] = lambda: None) -> Finished:
    return Command(folder, arguments, prepare).finish()
