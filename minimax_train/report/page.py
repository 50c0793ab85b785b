"""The page: what differs between runs, how they went, and what happened."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from statistics import median

from minimax_train.metrics.console import count
from minimax_train.report.charts import Curve, Mark, draw
from minimax_train.report.run import Run, differences

# In light and in dark; readable for the colour-blind (Okabe and Ito).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7f5fc7", "#6b7280")
_STYLE = """
:root { color-scheme: light dark; --text: #1c2430; --dim: #667085; --line: #d9dee7; --page: #fff; --card: #f8fafc; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e9ef; --dim: #98a2b3; --line: #323b49; --page: #14181f; --card: #1b212b; } }
body { margin: 0 auto; padding: 16px; max-width: 1560px; background: var(--page); color: var(--text);
  font: 14px/1.45 system-ui, "DejaVu Sans", sans-serif; }
h1 { font-size: 20px; } h2 { font-size: 16px; margin: 28px 0 8px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 12px; }
.chart { width: 100%; height: auto; background: var(--card); border: 1px solid var(--line); border-radius: 6px; }
.chart text { fill: var(--text); font: 12px system-ui, "DejaVu Sans", sans-serif; }
.chart .title { font-weight: 600; } .chart .tick { fill: var(--dim); font-size: 11px; }
.grid { stroke: var(--line); } .curve { fill: none; stroke: currentColor; stroke-width: 1.6; }
.dot { fill: currentColor; } .mark { stroke: currentColor; stroke-dasharray: 3 3; stroke-width: 1.2; opacity: .7; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 3px 14px 3px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td { overflow-wrap: anywhere; } .dim { color: var(--dim); }
.legend { position: sticky; top: 0; background: var(--page); padding: 6px 0; display: flex; flex-wrap: wrap;
  gap: 18px; }
.legend span::before { content: ""; display: inline-block; width: 22px; height: 0; border-top: 3px solid currentColor;
  margin-right: 6px; vertical-align: 4px; }
.legend b { color: var(--text); font-weight: 600; }
"""
_LAST = 50  # records that the summary goes by
_EVENTS_SHOWN = 200  # of a run, the latest
_MARKED = ("start", "outlier", "rollback", "checkpoint", "stage", "stall", "stopped")


def page(runs: Sequence[Run]) -> str:
    """An HTML document that loads nothing."""
    sections = [
        ("Summary", _summary(runs)),
        ("What differs", _differences(runs)),
        ("Loss", _charts([*_losses(runs), *_families(runs, "loss_by_source/", "loss_by_length/")])),
        ("Speed", _charts(_singles(runs, _SPEED))),
        ("Memory", _charts(_singles(runs, _MEMORY))),
        ("Routing", _charts([*_singles(runs, _ROUTING), *_layers(runs)])),
        ("Norms", _charts([*_singles(runs, _NORM), *_families(runs, "grad_norm/", "weight_norm/")])),
        ("Events", _events(runs)),
    ]
    colours = "".join(f".run-{i} {{ color: {_COLOURS[i % len(_COLOURS)]}; }}\n" for i in range(len(runs)))
    colours += "".join(
        f".curve.run-{i} {{ stroke-dasharray: {2 + 4 * (i // len(_COLOURS))} 3; }}\n"
        for i in range(len(_COLOURS), len(runs))
    )
    names = " · ".join(run.name for run in runs)
    legend = "".join(f'<span class="run-{i}"><b>{escape(run.name)}</b></span>' for i, run in enumerate(runs))
    body = "".join(f"<h2>{title}</h2>\n{content}\n" for title, content in sections if content)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(names)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}{colours}</style></head>\n"
        f'<body><h1>{escape(names)}</h1>\n<div class="legend">{legend}</div>\n{body}</body></html>\n'
    )


_SPEED = {
    "tokens_per_second": "tokens per second",
    "mfu": "MFU",
    "tflops_per_rank": "TFLOP/s per rank",
    "seconds": "seconds per step",
}
_MEMORY = {
    "peak_memory_gib": "peak GPU memory of rank 0 (GiB)",
    "memory_gib": "GPU memory of rank 0 (GiB)",
    "fullest_memory_gib": "fullest rank's memory (GiB)",
    "host_memory_gib": "host memory of rank 0 (GiB)",
}
_ROUTING = {
    "expert_load_max": "busiest expert (1: an equal share)",
    "expert_load_min": "idlest expert (1: an equal share)",
    "router_entropy": "router entropy (nats)",
    "dropped_fraction": "share of assignments dropped",
    "aux_loss": "load-balancing loss",
}
_NORM = {"grad_norm": "gradient norm"}
_BY_LAYER = ("expert_load_max", "expert_load_min", "router_entropy", "dropped_fraction")


def _charts(charts: Iterable[str]) -> str:
    drawn = "".join(charts)
    return drawn and f'<div class="charts">{drawn}</div>'


def _losses(runs: Sequence[Run]) -> Iterable[str]:
    for axis, name in (("tokens", "tokens"), ("step", "steps"), ("hours", "hours of training")):
        curves = _curves(runs, "loss", axis)
        curves += [
            Curve(curve.run, f"{curve.label}, held out", curve.points, dots=True)
            for curve in _curves(runs, "validation_loss", axis)
        ]
        yield draw(f"loss over {name} (dots: held out)", name, curves, _marks(runs, axis), settled=True)


def _singles(runs: Sequence[Run], titles: dict[str, str]) -> Iterable[str]:
    for metric, title in titles.items():
        curves = _curves(runs, metric, "tokens")
        if any(y for curve in curves for _, y in curve.points):
            yield draw(title, "tokens", curves)


def _families(runs: Sequence[Run], *prefixes: str) -> Iterable[str]:
    for prefix in prefixes:
        for metric in dict.fromkeys(name for run in runs for name in run.names(prefix)):
            yield draw(metric, "tokens", _curves(runs, metric, "tokens"), settled=prefix.startswith("loss"))


def _layers(runs: Sequence[Run]) -> Iterable[str]:
    for metric in _BY_LAYER:
        curves = []
        for i, run in enumerate(runs):
            values = [run.last(name) for name in run.names(f"{metric}/layer_")]
            points = [(float(layer), value) for layer, value in enumerate(values) if value is not None]
            curves += [Curve(i, run.name, points, dots=True)] if points else []
        if any(y for curve in curves for _, y in curve.points):
            yield draw(f"{_ROUTING[metric]} by layer, last record", "layer", curves)


def _curves(runs: Sequence[Run], metric: str, axis: str) -> list[Curve]:
    found = [(i, run, run.points(metric, axis)) for i, run in enumerate(runs)]
    return [Curve(i, f"{run.name}: {metric}", points) for i, run, points in found if points]


def _marks(runs: Sequence[Run], axis: str) -> list[Mark]:
    """Restarts and what else happened; the first start is no event."""
    marks = []
    for i, run in enumerate(runs):
        for event in run.events:
            if event["event"] in _MARKED and not (event["event"] == "start" and event["step"] == 0):
                marks.append(Mark(i, run.place(event["step"], axis), f"{run.name}: {event['event']}: {event['text']}"))
    return marks


def _summary(runs: Sequence[Run]) -> str:
    def latest(metric: str, written: Callable[[float], str]) -> Callable[[Run], str]:
        def of(run: Run) -> str:
            values = [record[metric] for record in run.records if metric in record][-_LAST:]
            return written(median(values)) if values else "-"

        return of

    def last(metric: str, written: Callable[[float], str]) -> Callable[[Run], str]:
        return lambda run: "-" if (value := run.last(metric)) is None else written(value)

    columns: dict[str, Callable[[Run], str]] = {
        "ranks": lambda run: next((e["text"] for e in reversed(run.events) if e["event"] == "start"), "-"),
        "starts": lambda run: str(sum(event["event"] == "start" for event in run.events) or "-"),
        "steps": last("step", "{:,.0f}".format),
        "tokens": last("tokens", count),
        "loss": last("loss", "{:.4f}".format),
        "held out": last("validation_loss", "{:.4f}".format),
        "tokens/s": latest("tokens_per_second", "{:,.0f}".format),
        "TFLOP/s a rank": latest("tflops_per_rank", "{:.3g}".format),
        "MFU": latest("mfu", "{:.1%}".format),
        "peak GiB": last("peak_memory_gib", "{:.2f}".format),
    }
    rows = [[run.name, *(of(run) for of in columns.values())] for run in runs]
    return _table(["run", *columns], rows) + f'<p class="dim">Speed: the median of the last {_LAST} records.</p>'


def _differences(runs: Sequence[Run]) -> str:
    found = differences(list(runs))
    if len(runs) == 1:
        return ""
    if not found:
        return "<p>Nothing: all configurations are the same.</p>"
    return _table(["key", *(run.name for run in runs)], [[key, *values] for key, values in found.items()])


def _events(runs: Sequence[Run]) -> str:
    found = [(event["time"], run.name, event) for run in runs for event in run.events[-_EVENTS_SHOWN:]]
    rows = []
    for at, name, event in sorted(found, key=lambda entry: entry[0]):
        when = datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S")
        rows.append([when, name, event["event"], f"{event['step']:,}", event["text"]])
    return _table(["UTC", "run", "event", "after step", ""], rows) if rows else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def row(tag: str, cells: Iterable[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>\n"

    return f'<div class="scroll"><table>{row("th", head)}{"".join(row("td", cells) for cells in rows)}</table></div>'
