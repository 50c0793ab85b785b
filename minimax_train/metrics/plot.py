"""Pictures: of a run at its end, of a recipe's schedule before it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from minimax_train.recipe import StepPlan


def plot_loss(records: Sequence[dict], path: Path) -> None:
    """Draw training, held-out and unigram loss over steps as a PNG.

    Args:
        records: the lines of ``metrics.jsonl``.
    """
    figure = new_figure(8, 4.5)
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


def plot_schedule(samples: Iterable[tuple[int, StepPlan]], path: Path) -> None:
    """Draw learning rate, tokens per step, sequence length, RoPE base and shares of the mixture as a PNG, each stage as
    wide as the others: the last ones of a run are short beside the first.

    Args:
        samples: tokens before a step, and its plan, as of :meth:`minimax_train.recipe.Recipe.samples`.
    """
    samples = list(samples)
    stages = list(dict.fromkeys(plan.stage for _, plan in samples))
    curves = {
        "learning rate": lambda plan: plan.learning_rate,
        "tokens per step": lambda plan: plan.tokens,
        "sequence length": lambda plan: plan.sequence_length,
        "RoPE base": lambda plan: plan.rope_base,
    }
    figure = new_figure(2 + 1.5 * len(stages), 7)
    rows = figure.subplots(len(curves) + 1, len(stages), sharey="row", squeeze=False)
    components = sorted({name for _, plan in samples for name in plan.data_weights})
    for column, stage in enumerate(stages):
        taken = [(tokens, plan) for tokens, plan in samples if plan.stage == stage]
        tokens, plans = [at for at, _ in taken], [plan for _, plan in taken]
        for axes, (name, value) in zip(rows[:, column], curves.items(), strict=False):
            axes.plot(tokens, [value(plan) for plan in plans])
            axes.set_yscale("log", base=2 if name in ("tokens per step", "sequence length") else 10)
            rows[list(curves).index(name), 0].set_ylabel(name)
        shares = [[plan.data_weights.get(name, 0.0) for plan in plans] for name in components]
        rows[-1, column].stackplot(tokens, shares, labels=components, step="post")
        rows[0, column].set_title(stage, fontsize=9)
        rows[-1, column].set_xlabel("tokens")
        for axes in rows[:, column]:
            axes.grid(alpha=0.3)
            axes.tick_params(labelsize=7)
            axes.locator_params(axis="x", nbins=3)
            if axes is not rows[-1, column]:
                axes.set_xticklabels([])
    rows[-1, 0].set_ylabel("share of tokens")
    rows[-1, -1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches, which needs no display."""
    # Matplotlib reads MPLBACKEND when it is imported. Jupyter names a backend there that only its own kernel has.
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
