"""The picture at the end of a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def plot_loss(records: Sequence[dict], path: Path) -> None:
    """Draw training, held-out and unigram loss over steps as a PNG.

    Args:
        records: the lines of ``metrics.jsonl``.
    """
    # Matplotlib reads MPLBACKEND when it is imported. Jupyter names a backend there that only its own kernel has.
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    curves = {"loss": ("training", "-"), "validation_loss": ("held-out", "o-"), "unigram_loss": ("unigram", "--")}
    for key, (label, style) in curves.items():
        points = [(record["step"], record[key]) for record in records if key in record]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
