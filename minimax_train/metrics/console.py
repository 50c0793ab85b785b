"""The live line of a run: a progress bar on a terminal, one line per report elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SHOWN = {
    "loss": "loss {:.4f}",
    "grad_norm": "grad {:.2f}",
    "learning_rate": "lr {:.2e}",
    "tokens": "{:,} tokens",
    "tokens_per_second": "{:,.0f} tok/s",
    "mfu": "{:.1%} MFU",
    "validation_loss": "held-out loss {:.4f}",
    "unigram_loss": "unigram {:.4f}",
    "skipped_documents": "skipped {:,} documents",
}


def summarize(metrics: Mapping[str, float]) -> str:
    """The metrics a person watches, in a line."""
    return "  ".join(text.format(metrics[name]) for name, text in SHOWN.items() if name in metrics)


class Output:
    """A text stream whose reader may leave: what is written after that is dropped, and nobody is stopped by it.

    Args:
        stream: ``sys.stdout`` or ``sys.stderr``; None when the process was started with it closed.
        lost: is told once, when the stream takes no more: the reader of a pipe has gone (``| head``), the terminal has,
            or the disk is full.
    """

    def __init__(self, stream: TextIO | None, lost: str | None = None) -> None:
        self._stream, self._lost = stream, lost

    def write(self, text: str) -> int:
        try:
            if self._stream is not None:
                self._stream.write(text)
                self._stream.flush()
        except UnicodeEncodeError as error:
            return self.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        except (OSError, ValueError) as error:  # ValueError: closed
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        self.write("")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def _drop(self, error: Exception) -> None:
        stream, self._stream = self._stream, None
        try:
            # What is left in its buffer goes nowhere: the interpreter's flush at exit would fail once more.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())  # type: ignore[union-attr]
            os.close(nowhere)
        except (OSError, ValueError):
            pass
        if self._lost is not None:
            note(f"{self._lost} ({error})")


def to_stderr(line: str) -> None:
    """A line for the person who started the run; dropped if nobody can read it."""
    Output(sys.stderr).write(line + "\n")


def note(text: str) -> None:
    """Something that does not stop the run."""
    to_stderr(f"note: {text}")


class ConsoleReporter:
    """Shows progress on standard output."""

    def __init__(self, total_steps: int, first_step: int) -> None:
        self.total_steps, self.stage = total_steps, ""
        output: Any = Output(sys.stdout, "standard output is closed: the run goes on without, and writes metrics.jsonl")
        self.console = Console(file=output, soft_wrap=True, highlight=False)
        self.progress: Progress | None = None
        if self.console.is_terminal:
            self.progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.progress.add_task("", total=total_steps, completed=first_step)
            self.progress.start()

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        line = f"{self.stage}  {summarize(metrics)}".strip()
        if self.progress is None or "validation_loss" in metrics:
            self.say(f"step {step}/{self.total_steps}  {line}")
        else:
            self.progress.update(self.task, completed=step, total=self.total_steps, description=line)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
