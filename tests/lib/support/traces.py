"""A profiler trace of a step (Kineto's JSON, ``logging.profile_steps``) as a picture: what the GPU does, and when."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minimax_train.phases import PHASES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Span = tuple[float, float]  # start and end, ms since the step began
# By kind, what the names of its kernels contain; the first that fits. Triton's are called like their functions in
# kernels/, where forward and backward are those of the norms and of SiLU.
_KINDS = {
    "lightning attention": r"^(attend|attend_dk_dv|subsplit_states|block_states|sum_blocks|plan_blocks|cut_tiles)$",
    "softmax attention": r"flash|^rotate$",
    "expert GEMMs": r"quack",
    "routing, permutation": r"^(route|route_backward|add_router_gradient|count|scan|rank|permute|unpermute)$",
    "dense GEMMs": r"nvjet|cublas|gemm",
    "norms, elementwise, sums": r"^(forward|backward|swiglu|swiglu_backward)$|elementwise_kernel|reduce_kernel",
    "loss": r"^(softmax_gradient|log_sums|gradients)$",
    "optimizer, norms of parameters": r"^(adamw|sum_squares)$|multi_tensor_apply|lpnorm",
}
OTHERS, IDLE = "others", "idle"
_COLOURS = ("#0072b2", "#56b4e9", "#d55e00", "#e69f00", "#009e73", "#cc79a7", "#7f5fc7", "#b8860b", "#6b7280")


def kind_of(kernel: str) -> str:
    """What a kernel is for, by its name."""
    return next((kind for kind, names in _KINDS.items() if re.search(names, kernel)), OTHERS)


def merge(spans: Iterable[Span], gap: float = 0.0) -> list[Span]:
    """Those that overlap, or lie no further apart than ``gap`` (ms), as one; in order."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1] + gap:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


@dataclass(frozen=True)
class Trace:
    """A step of one rank.

    Attributes:
        host, device: spans by phase.
        kernels: of the GPU, by kind; copies and memsets are among the others.
        end: of the step: that of its last kernel (ms).
    """

    host: dict[str, list[Span]]
    device: dict[str, list[Span]]
    kernels: dict[str, list[Span]]
    end: float

    @classmethod
    def read(cls, path: Path) -> Trace:
        events = [e for e in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"] if e["ph"] == "X"]
        phases = [e for e in events if e["cat"] == "user_annotation" and e["name"] in PHASES]
        start = min(e["ts"] for e in phases)

        def by(names: Iterable[str], of: Iterable[dict]) -> dict[str, list[Span]]:
            found: dict[str, list[Span]] = {}
            for name, e in zip(names, of, strict=True):
                found.setdefault(name, []).append(((e["ts"] - start) / 1e3, (e["ts"] + e["dur"] - start) / 1e3))
            return found

        on_device = [e for e in events if e["cat"] == "gpu_user_annotation" and e["name"] in PHASES]
        kernels = [e for e in events if e["cat"] in ("kernel", "gpu_memcpy", "gpu_memset")]
        return cls(
            by([e["name"] for e in phases], phases),
            by([e["name"] for e in on_device], on_device),
            by([kind_of(e["name"]) for e in kernels], kernels),
            max(e["ts"] + e["dur"] - start for e in kernels) / 1e3,
        )

    def shares(self) -> dict[str, float]:
        """Of the step's time, by kind, with what is left in which no kernel runs. Kernels side by side count twice."""
        shares = {kind: sum(b - a for a, b in self.kernels.get(kind, ())) / self.end for kind in (*_KINDS, OTHERS)}
        busy = merge(span for spans in self.kernels.values() for span in spans)
        return {**shares, IDLE: 1 - sum(b - a for a, b in busy) / self.end}


def draw_trace(trace: Trace, picture: Path) -> None:
    """The whole step, and below it the layers around the first softmax attention."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shares = trace.shares()
    rows = ["host", "GPU", *_KINDS, OTHERS]
    first = min(start for start, _ in trace.kernels["softmax attention"])
    figure, axes = plt.subplots(2, 1, figsize=(11, 7), layout="constrained")
    # What a pixel cannot show is left out, so that the file stays small.
    views = ((0.0, trace.end, 0.02, 0.1), (first - 3, first + 3, 0.002, 0.0))
    for axis, (left, right, shortest, gap) in zip(axes, views, strict=True):
        for row, phases in enumerate((trace.host, trace.device)):
            for name, spans in phases.items():
                for a, b in _within(spans, left, right):
                    _bars(axis, [(a, b)], row, "#d9dee7")
                    if b - a > (right - left) / 30:
                        axis.text((a + b) / 2, row, name, ha="center", va="center", fontsize=8)
        for row, (kind, colour) in enumerate(zip((*_KINDS, OTHERS), _COLOURS, strict=True), start=2):
            spans = [(a, b) for a, b in trace.kernels.get(kind, ()) if b - a >= shortest]
            _bars(axis, _within(merge(spans, gap), left, right), row, colour)
        axis.set(xlim=(left, right), ylim=(len(rows) - 0.5, -0.5), yticks=range(len(rows)), yticklabels=rows)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    axes[0].set_yticklabels([f"{row}  {shares[row]:.1%}" if row in shares else row for row in rows])
    axes[0].set_title("a step: phases of host and GPU, kernels by kind with their share of the step", fontsize=10)
    axes[1].set_title(
        "of its forward pass: a block with lightning attention, and one with softmax attention", fontsize=10
    )
    axes[1].set_xlabel("ms since the step began", fontsize=9)
    with matplotlib.rc_context({"svg.hashsalt": "trace", "svg.fonttype": "none"}):
        figure.savefig(picture, metadata={"Date": None} if picture.suffix == ".svg" else None)
    plt.close(figure)


def _within(spans: Iterable[Span], left: float, right: float) -> list[Span]:
    return [(max(a, left), min(b, right)) for a, b in spans if b > left and a < right]


def _bars(axis: Axes, spans: Sequence[Span], row: int, colour: str) -> None:
    """As one path: a patch for each would make the file three times as large."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    low, high = row - 0.4, row + 0.4
    bars = [Outline([(a, low), (b, low), (b, high), (a, high), (a, low)], closed=True) for a, b in spans]
    if bars:
        axis.add_patch(PathPatch(Outline.make_compound_path(*bars), color=colour, lw=0.3, snap=False))
