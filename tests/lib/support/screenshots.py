"""The pictures of docs/seeing.md: the console as two terminals show a run's last record, the report of some runs, and
a profiler trace.

    PYTHONPATH=tests/lib .venv/bin/python tests/lib/support/screenshots.py RUN [RUN...]
    PYTHONPATH=tests/lib .venv/bin/python tests/lib/support/screenshots.py --trace RUN/traces/step-....json.gz

The first needs Chromium (``make browser``). The second prints the table of shares as well.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
from pathlib import Path

from rich.console import Console

from minimax_train.files import METRICS
from minimax_train.metrics.console import ConsoleReporter, summarize
from minimax_train.metrics.log import read_records
from minimax_train.report.cli import main as report
from support.traces import Trace, draw_trace

PLOTS = Path(__file__).parents[3] / "docs/plots"


def console(run: Path, columns: int) -> None:
    """Two lines of an evaluation and a checkpoint, and the table below them."""
    records = read_records(run / METRICS)
    steps = records[-1]["step"]
    shown = ConsoleReporter(steps, 0)
    terminal = Console(record=True, width=columns, file=io.StringIO(), force_terminal=True, legacy_windows=False)
    shown.console = terminal
    for record in records[: 2 * len(records) // 3]:
        step, metrics = record["step"], {name: value for name, value in record.items() if name != "step"}
        if "validation_loss" in metrics:
            last = f"step {step}/{steps}  {summarize(metrics)}"
        shown.take(step, metrics)
    terminal.print(last, soft_wrap=True, highlight=False)
    terminal.print(shown.table())
    (PLOTS / f"console-{columns}.svg").write_text(terminal.export_svg(title=f"minimax-train, {columns} columns"))


def page(runs: list[str]) -> None:
    html, browser = PLOTS / "report.html", shutil.which("chromium")
    assert browser is not None, __doc__
    assert report([*runs, "-o", str(html)]) == 0
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1300,1500"]
    subprocess.run([*command, f"--screenshot={PLOTS}/report.png", html.as_uri()], check=True, capture_output=True)
    html.unlink()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN")
    parser.add_argument("--trace", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.runs:
        for columns in (60, 120):
            console(Path(options.runs[-1]), columns)
        page(options.runs)
    if options.trace is not None:
        trace = Trace.read(options.trace)
        draw_trace(trace, PLOTS / "trace.svg")
        for kind, share in trace.shares().items():
            print(f"| {kind} | {share * trace.end:.1f} | {share:.1%} |")
