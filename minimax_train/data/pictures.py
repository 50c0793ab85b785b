"""Pictures of a mixture that is looked at without training, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from minimax_train.data.show import Point, Span
from minimax_train.metrics.plot import new_figure


def plot_lengths(histograms: Mapping[str, Sequence[int]], path: Path) -> None:
    """Draw how long documents are.

    Args:
        histograms: of each source, documents of at least 1, 2, 4, 8, ... tokens and of fewer than twice as many.
    """
    figure = new_figure(8, 4.5)
    axes = figure.add_subplot()
    for name, counts in histograms.items():
        share = [count / max(1, sum(counts)) for count in counts]
        axes.stairs(share, [2**i for i in range(len(counts) + 1)], label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens of a document")
    axes.set_ylabel("share of the documents")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def plot_mixture(schedule: Sequence[Span], realised: Sequence[Point], path: Path) -> None:
    """Draw the share of each component over the tokens of a run, asked (lines) and realised (dots).

    Stages are equally wide, however long they are; the axis names the tokens at their edges.
    """
    edges: dict[str, tuple[int, int]] = {}
    for span in schedule:
        edges[span.stage] = edges.get(span.stage, (span.begin, 0))[0], span.end
    index = {stage: i for i, stage in enumerate(edges)}

    def place(stage: str, tokens: float) -> float:
        begin, end = edges[stage]
        return index[stage] + (tokens - begin) / (end - begin)

    figure = new_figure(8, 4.5)
    axes = figure.add_subplot()
    for component in dict.fromkeys(name for span in schedule for name in span.weights):
        x = [place(span.stage, tokens) for span in schedule for tokens in (span.begin, span.end)]
        y = [span.weights.get(component, 0.0) for span in schedule for _ in range(2)]
        (line,) = axes.plot(x, y, label=component)
        found = [(place(p.stage, p.tokens), p.shares.get(component, 0.0)) for p in realised]
        axes.plot(*zip(*found, strict=True), ".", color=line.get_color(), markersize=4)
    axes.set_xticks(range(len(edges) + 1), [f"{tokens:.3g}" for tokens in (0, *(end for _, end in edges.values()))])
    for stage, i in index.items():
        axes.text(i + 0.5, 1.01, stage, ha="center", va="bottom", fontsize=8, transform=axes.get_xaxis_transform())
    axes.set_xlabel("tokens of the run")
    axes.set_ylabel("share of the tokens (dots: in what was packed)")
    axes.set_ylim(0, 1.0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
