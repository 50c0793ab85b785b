"""Both attentions over the number of tokens, 2K to 1M: time per token, beside their peers and their floors.

    python benchmarks/lengths.py --json FILE [--tokens 2048 ...] [--peer]
    python benchmarks/lengths.py --plot FILE PICTURE.svg       # needs no GPU

bfloat16, head dim 128, one document. Lightning attention: 64 heads, fewer where their tensors do not fit (a token's
time is scaled to 64); device time; floor: 4 tensors read or written forward, 11 with backward, at the
copy rate of the run. Softmax attention: 64 query heads, 8 of keys and values, ours and FlashAttention-4's own entry
point in turns; floor: its FLOP at the rate of a dense 8192^3 GEMM in the run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from drawing import save, subplots
from softmax import PEER, rows
from timing import copy_rate, gemm_rate

from kernels import DIM, device_times, lightning_calls, lightning_implementations, lightning_inputs
from minimax_train.documents import Documents
from minimax_train.kernels.lightning import lightning_slopes
from minimax_train.kernels.softmax import flash4

HEADS = 64
LONGEST_SOFTMAX = 131_072  # beyond, a call takes seconds
LONGEST_PEER = 131_072
FLA = "flash-linear-attention"


def heads_that_fit(tokens: int) -> int:
    """As many of 64 as leave room for q, k, v, output, four gradients and what passes between kernels."""
    heads, free = HEADS, torch.cuda.mem_get_info()[0]
    while 10 * tokens * heads * DIM * 2 > free and heads > 1:
        heads //= 2
    return heads


def lightning_point(tokens: int, peer: bool) -> list[dict]:
    heads = heads_that_fit(tokens)
    *qkv, d_out = lightning_inputs(tokens, heads)
    slopes_H, documents = lightning_slopes(heads, 0, 80).cuda(), Documents.from_lengths([tokens], "cuda")
    found = lightning_implementations(peer)
    runs = {"ours": "triton"} | ({FLA: "fla"} if peer and tokens <= LONGEST_PEER else {})
    points = []
    for name, run in runs.items():
        calls = lightning_calls(run, found[run], qkv, d_out, slopes_H, documents)
        ms = [device_times(run, call) for call in calls]
        scaled = [HEADS / heads * x * 1e6 / tokens for x in ms]
        points.append({"op": "lightning", "name": name, "tokens": tokens, "heads": heads, "ms": ms, "ns": scaled})
    return points


def softmax_point(tokens: int) -> list[dict]:
    found = rows([tokens], [PEER, "flash4"] if flash4.is_installed() else ["flash"])
    named = [(row, row["implementation"] if row["implementation"] == PEER else "ours") for row in found]
    return [
        {"op": "softmax", "name": name, "tokens": tokens, "heads": HEADS}
        | {"ms": (ms := [row["forward_ms"], row["both_ms"]]), "ns": [x * 1e6 / tokens for x in ms]}
        for row, name in named
    ]


def floors(op: str, tokens: int, machine: dict) -> list[float]:
    """Least nanoseconds per token forward, and with backward."""
    if op == "lightning":
        return [n * HEADS * DIM * 2 / machine["copy"] * 1e9 for n in (4, 11)]
    return [n * (tokens + 1) / 2 * HEADS * DIM / machine["dense"] * 1e9 for n in (4, 14)]


def measure(options: argparse.Namespace) -> None:
    machine = {"name": torch.cuda.get_device_name(), "torch": torch.__version__}
    machine |= {"copy": copy_rate(), "dense": gemm_rate(8192, 8192, 8192)}
    print(machine, flush=True)
    points = []
    for tokens in options.tokens:
        found = lightning_point(tokens, options.peer)
        torch.cuda.empty_cache()
        if tokens <= LONGEST_SOFTMAX:
            found += softmax_point(tokens)
        for point in found:
            of_floor = [a / b for a, b in zip(point["ns"], floors(point["op"], tokens, machine), strict=True)]
            point["of_floor"] = of_floor
            cells = "  ".join(f"{ns:9.2f} ns ({x:.2f})" for ns, x in zip(point["ns"], of_floor, strict=True))
            print(f"{point['op']:>9} {point['name']:>22} {tokens:8d} x {point['heads']:2d} heads  {cells}", flush=True)
        points += found
        torch.cuda.empty_cache()
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "points": points}, indent=1))


def plot(source: Path, picture: Path) -> None:
    found = json.loads(source.read_text())
    machine, points = found["machine"], found["points"]
    figure, axes = subplots(1, 2, (10, 4.6), sharey=True)
    for axis, (index, title) in zip(axes, enumerate(["forward", "forward + backward"]), strict=True):
        for op, color, dark in [("lightning", "tab:blue", "navy"), ("softmax", "tab:red", "black")]:
            of_op = [point for point in points if point["op"] == op]
            for name in dict.fromkeys(point["name"] for point in of_op):
                line = [(point["tokens"], point["ns"][index]) for point in of_op if point["name"] == name]
                how: dict[str, Any] = {"color": color, "marker": "o", "markersize": 4}
                if name != "ours":  # on top: a peer may lie on our line
                    how = {"color": dark, "marker": "x", "linestyle": "--", "linewidth": 0.8, "zorder": 3}
                axis.plot(*zip(*line, strict=True), label=f"{op}, {name}", **how)
            lengths = sorted({point["tokens"] for point in of_op})
            least = [floors(op, tokens, machine)[index] for tokens in lengths]
            axis.plot(lengths, least, color=color, linestyle=":", label=f"{op}, floor")
        axis.set(xscale="log", yscale="log", xlabel="tokens in a sequence", title=title)
        axis.set_xticks([2**n for n in range(11, 21)], [f"{2 ** (n - 10)}K" for n in range(11, 20)] + ["1M"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("nanoseconds per token, 64 heads of 128")
    figure.suptitle(f"{machine['name']}, bf16", fontsize=10)
    save(figure, axes[0], picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2**n for n in range(11, 21)])
    parser.add_argument("--peer", action="store_true", help="also flash-linear-attention, which tunes for minutes")
    parser.add_argument("--json", type=Path, help="where to write the points")
    parser.add_argument("--plot", type=Path, nargs=2, metavar=("JSON", "PICTURE"), help="draw what --json wrote")
    options = parser.parse_args()
    if options.plot:
        plot(*options.plot)
    else:
        measure(options)


if __name__ == "__main__":
    main()
