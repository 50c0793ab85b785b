"""Pictures of the benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def subplots(rows: int, columns: int, size: tuple[float, float], **how: Any) -> tuple[Figure, list[Axes]]:
    """A figure that needs no display, and its axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **how)
    return figure, list(axes.flat)


def save(figure: Figure, axis: Axes, picture: Path) -> None:
    """With the legend of one axis below; the same bytes whenever the same is drawn."""
    import matplotlib

    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    with matplotlib.rc_context({"svg.hashsalt": "benchmarks"}):
        figure.savefig(picture, metadata={"Date": None} if picture.suffix == ".svg" else None)
