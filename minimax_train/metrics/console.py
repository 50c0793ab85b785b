"""What the person watching sees of a run: a live table on a terminal, one line per record elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

# In a line of a log.
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


def count(number: float) -> str:
    """Four digits and a thousand's name: ``123.5 B``, or the number itself below a million."""
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.4g} {name}"
    return f"{number:,.0f}"


# In the table of a terminal, the most wanted first: what it is called, and how it is written.
_CELLS: dict[str, tuple[str, Callable[[float], str]]] = {
    "loss": ("loss", "{:.4f}".format),
    "tokens_per_second": ("tokens/s", "{:,.0f}".format),
    "grad_norm": ("grad norm", "{:.3g}".format),
    "mfu": ("MFU", "{:.1%}".format),
    "validation_loss": ("held-out loss", "{:.4f}".format),
    "tflops_per_rank": ("TFLOP/s a rank", "{:,.3g}".format),
    "learning_rate": ("learning rate", "{:.2e}".format),
    "seconds": ("s a step", "{:.3g}".format),
    "tokens": ("tokens", count),
    "batch_tokens": ("tokens a step", count),
    "expert_load_max": ("busiest expert", "{:.2f}".format),
    "peak_memory_gib": ("peak memory", "{:.1f} GiB".format),
    "expert_load_min": ("idlest expert", "{:.2f}".format),
    "fullest_memory_gib": ("fullest rank", "{:.1f} GiB".format),
    "router_entropy": ("router entropy", "{:.3f}".format),
    "dropped_fraction": ("dropped", "{:.2%}".format),
    "outliers": ("outliers", "{:,}".format),
    "skipped_documents": ("skipped", "{:,}".format),
}
_LABEL, _VALUE, _GAP = 14, 12, 2  # columns of the terminal
_REDRAWN_PER_S = 2
_SLOWEST = "slowest_seconds/"


def summarize(metrics: Mapping[str, float]) -> str:
    """The metrics a person watches, in a line."""
    return "  ".join(text.format(metrics[name]) for name, text in SHOWN.items() if name in metrics)


def duration(seconds: float) -> str:
    """``4 d 3 h``, ``3 h 20 min``, ``4 min 5 s`` or ``12 s``."""
    parts, left = [], round(seconds)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if left >= size or (unit == "s" and not parts):
            parts.append(f"{left // size} {unit}")
        elif parts:
            parts.append("")
        left %= size
    return " ".join(parts[:2]).strip()


def billions(count: int) -> str:
    """``3.1 B``, ``8.0 M`` or ``14,480``."""
    if count < 1e6:
        return f"{count:,}"
    return f"{count / 1e9:,.1f} B" if count >= 1e9 else f"{count / 1e6:,.1f} M"


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


def _slowest(metrics: Mapping[str, float]) -> str:
    """Which rank takes the longest, in the longest phases."""
    seconds = {name.removeprefix(_SLOWEST): x for name, x in metrics.items() if name.startswith(_SLOWEST)}
    longest = sorted(seconds, key=lambda phase: -seconds[phase])[:3]
    parts = [f"{phase} rank {metrics[f'slowest_rank/{phase}']:.0f} {seconds[phase]:.3g} s" for phase in longest]
    return f"slowest: {', '.join(parts)}" if parts else ""


class ConsoleReporter:
    """Shows progress on standard output: a table that is drawn anew on a terminal, a line per record elsewhere."""

    def __init__(self, total_steps: int, first_step: int) -> None:
        self.total_steps, self.stage = total_steps, ""
        output: Any = Output(sys.stdout, "standard output is closed: the run goes on without, and writes metrics.jsonl")
        self.console = Console(file=output, soft_wrap=True, highlight=False)
        self._step, self._began, self._latest = first_step, time.monotonic(), dict[str, float]()
        self._live: Live | None = None
        if self.console.is_terminal:
            self._live = Live(get_renderable=self.table, console=self.console, refresh_per_second=_REDRAWN_PER_S)
            self._live.start()

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        self.take(step, metrics)
        if self._live is None or "validation_loss" in metrics:
            line = f"{self.stage}  {summarize(metrics)}".strip()
            self.say(f"step {step}/{self.total_steps}  {line}")

    def take(self, step: int, metrics: Mapping[str, float]) -> None:
        """For the table: a record, in the place of the one before, or what an evaluation adds to it."""
        kept = {name: x for name, x in self._latest.items() if "loss" not in metrics or name == "validation_loss"}
        self._step, self._latest = step, {**kept, **metrics}

    def table(self) -> RenderableType:
        """As wide as the terminal is now: of one, two or more columns of metrics."""
        latest = self._latest  # a thread of the table's own draws it
        head = f"step {self._step:,} of {self.total_steps:,}"
        times = f"{duration(time.monotonic() - self._began)} gone"
        if "seconds_left" in latest:
            times += f", {duration(latest['seconds_left'])} left"
        bar = ProgressBar(total=max(1, self.total_steps), completed=self._step, width=None)
        top = Table.grid(padding=(0, 1), expand=True)
        top.add_column(no_wrap=True)
        top.add_column(ratio=1)
        top.add_column(no_wrap=True, justify="right")
        top.add_row(f"{self.stage}  {head}".strip(), bar, times)
        columns = max(1, (self.console.width + _GAP) // (_LABEL + _VALUE + 2 * _GAP))
        cells = Table.grid(padding=(0, _GAP, 0, 0))
        for _ in range(columns):
            cells.add_column(width=_LABEL, no_wrap=True, style="dim")
            cells.add_column(width=_VALUE, no_wrap=True, justify="right")
        found = [(label, written(latest[name])) for name, (label, written) in _CELLS.items() if name in latest]
        for start in range(0, len(found), columns):
            cells.add_row(*chain.from_iterable(found[start : start + columns]))
        slowest = _slowest(latest)
        return Group(top, cells, *([Text(slowest, style="dim", overflow="ellipsis", no_wrap=True)] if slowest else []))

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
