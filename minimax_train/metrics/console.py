"""The live line of a run: a progress bar on a terminal, one line per report elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SHOWN = {
    "loss": "loss {:.4f}",
    "grad_norm": "grad {:.2f}",
    "learning_rate": "lr {:.2e}",
    "tokens_per_second": "{:,.0f} tok/s",
    "validation_loss": "held-out loss {:.4f}",
    "unigram_loss": "unigram {:.4f}",
    "skipped_documents": "skipped {:,} documents",
}


def summarize(metrics: Mapping[str, float]) -> str:
    """The metrics a person watches, in a line."""
    return "  ".join(text.format(metrics[name]) for name, text in SHOWN.items() if name in metrics)


class ConsoleReporter:
    """Shows progress on standard output."""

    def __init__(self, total_steps: int, first_step: int) -> None:
        self.total_steps = total_steps
        self.console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
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
        line = summarize(metrics)
        if self.progress is None or "validation_loss" in metrics:
            self.say(f"step {step}/{self.total_steps}  {line}")
        else:
            self.progress.update(self.task, completed=step, description=line)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
