"""The expert layer spread over ranks: what of its communication is exposed with 1, 2 and 4 token groups.

    python benchmarks/experts.py --link emulated --ranks 2 4 8 [--rate nvlink network] [--json FILE] [--trace FILE]
    torchrun --nproc-per-node 2 benchmarks/experts.py --link nccl
    python benchmarks/experts.py --plot TRACE ... PICTURE.svg                # needs no GPU

Forward + backward of one layer at MiniMax width, from permutation to combination, without the router: all ranks on the
``ep`` axis, or all on ``etp``, or two on ``etp`` and the others on ``ep``. *Exposed* is its time less that of the same
calls over a link that takes no time (``FreeLink``: the same streams, shapes and kernels, no byte moved); the two
alternate, and the median of the differences counts. Emulated, one GPU plays the rank that gets most routed tokens, and
*transfers* is what the link needs for all of them, one after the other. FLOP/s are of the GEMMs (18 D F per routed
token), and their share is of dense 8192^3 GEMMs, which take turns with the layer, so that both run at the clock that
the power limit allows for long. Before each call the device sleeps some milliseconds, as it
would be busy with the attention before this layer, so that the host is ahead when the layer starts.

Routing: *balanced*, every expert gets the same; *skewed*, log-normal popularity, the same on every rank.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from drawing import save, subplots
from link import RATES, EmulatedLink, FreeLink
from timing import in_turn
from torch import Tensor

from minimax_train.kernels.experts import expert_mlp
from minimax_train.parallel.communicator import Communicator, GroupCommunicator
from minimax_train.parallel.environment import ProcessEnvironment
from minimax_train.parallel.experts import ExpertParallel
from minimax_train.parallel.grid import EXPERT_TRANSFER_CTAS, ProcessGrid

TOP_K = 2
DENSE = 40
DENSE_FLOP = DENSE * 2 * 8192**3


def balanced(tokens: int, experts: int) -> Tensor:
    """Two different experts per token, each expert as often as any other."""
    first_T = torch.arange(tokens) % experts
    second_T = (first_T + 1 + torch.arange(tokens) // experts % (experts - 1)) % experts
    return torch.stack([first_T, second_T], 1)[torch.randperm(tokens)]


def skewed(tokens: int, experts: int) -> Tensor:
    popularity_E = (0.7 * torch.randn(experts)).exp()
    return torch.multinomial(popularity_E.expand(tokens, -1), TOP_K)


def make_inputs(routing: str, ep: int, etp: int, options: argparse.Namespace) -> tuple[int, float, list[Tensor]]:
    """The rank on ``ep`` with most routed tokens, its FLOPs, and x, weights, experts, gate_up and down of one rank."""
    torch.manual_seed(0)
    D, F, E, T = options.hidden, options.expert_hidden, options.experts, options.tokens
    experts_TK = {"balanced": balanced, "skewed": skewed}[routing](T, E)
    routed_I = torch.bincount(experts_TK.flatten(), minlength=E).view(ep, -1).sum(1)
    shapes = [(T, D), (T, TOP_K), (E // ep, 2 * F // etp, D), (E // ep, D, F // etp)]
    scales = [1.0, 1.0, D**-0.5, F**-0.5]
    where = {"device": options.device, "dtype": options.dtype}
    x, weights, gate_up, down = (s * torch.randn(shape, **where) for s, shape in zip(scales, shapes, strict=True))
    leaves = [t.requires_grad_() for t in (x, weights.float(), gate_up, down)]
    rank = int(routed_I.argmax())
    # Every rank routes alike, so an expert's tokens come from all of them.
    flops = 18.0 * float(routed_I[rank]) * ep * etp * D * F / etp
    return rank, flops, [*leaves[:2], experts_TK.to(options.device), *leaves[2:]]


def links(ep: int, etp: int, groups: int, rank: int, options: argparse.Namespace, rate: str) -> dict[str, list[Any]]:
    """Both axes' communicators: of the link that is measured, and of one that takes no time. Over NCCL they are those
    of a run with so many token groups."""
    if options.link == "nccl":
        grid = ProcessGrid.create(options.device, timedelta(seconds=60), ep=ep, etp=etp, token_groups=groups)
        linked: list[Any] = [GroupCommunicator(grid.group(axis)) for axis in ("ep", "etp")]
    else:
        axes = ((rank, ep), (0, etp))
        linked = [EmulatedLink(place, size, *RATES[rate], sms=options.sms) for place, size in axes]
    return {"linked": linked, "free": [FreeLink(link.rank, link.size) for link in linked]}


def busy_ms(links: list[Communicator]) -> float:
    """What the transfers over emulated links so far take."""
    return 1e3 * sum(link.busy_s for link in links if isinstance(link, EmulatedLink))


def one_call(layer: Callable, inputs: list[Tensor], dy_TD: Tensor) -> Callable[[], object]:
    def run() -> object:
        return torch.autograd.grad(layer(*inputs), [t for t in inputs if t.requires_grad], dy_TD)

    return run


def milliseconds(run: Callable[[], object]) -> float:
    """One call on the device, once all ranks are there."""
    if not torch.cuda.is_available():
        run()
        return float("nan")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if dist.is_initialized():
        dist.barrier()
    torch.cuda._sleep(6_000_000)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure(ep: int, etp: int, routing: str, rate: str, options: argparse.Namespace) -> list[dict]:
    rank, flops, inputs = make_inputs(routing, ep, etp, options)
    dy_TD = torch.randn_like(inputs[0])
    both = {groups: links(ep, etp, groups, rank, options, rate) for groups in options.groups}
    runs: dict[Any, Callable[[], Any]] = {
        (groups, kind): one_call(ExpertParallel(*axes, num_experts=options.experts, token_groups=groups), inputs, dy_TD)
        for groups, of_groups in both.items()
        for kind, axes in of_groups.items()
    }
    linked = [link for of_groups in both.values() for link in of_groups["linked"]]
    runs["dense"] = dense_gemms(options)
    transfers = {}
    for key, run in runs.items():
        before = busy_ms(linked)
        milliseconds(run)
        transfers[key] = busy_ms(linked) - before
    for free in (link for of_groups in both.values() for link in of_groups["free"]):
        free.moving = not torch.cuda.is_available()
    samples = {key: [] for key in runs}
    for repeat in range(options.repeats):
        for key, run in in_turn(runs.items(), repeat):
            samples[key].append(milliseconds(run))
    dense = DENSE_FLOP / statistics.median(samples["dense"]) * 1e3
    del runs["dense"]
    if not all(torch.isfinite(t).all() for run in runs.values() for t in run()):
        print("what a free link left was not finite: its times may be too short")
    rows, first = [], None
    for groups in options.groups:
        of_link, of_free = (slowest(samples[groups, kind]) for kind in ("linked", "free"))
        exposed = statistics.median(a - b for a, b in zip(of_link, of_free, strict=True))
        ms = statistics.median(of_link)
        first = exposed if first is None else first
        place = {"ranks": ep * etp, "axis": axes_name(ep, etp), "routing": routing, "rate": rate}
        times = {"groups": groups, "ms": ms, "free": statistics.median(of_free), "exposed": exposed}
        if options.link == "emulated":
            times["transfers"] = transfers[groups, "linked"]
        rates = {"of_1": exposed / first, "tflops": flops / ms / 1e9, "of_dense": flops / ms * 1e3 / dense}
        rows.append({**place, **times, **rates})
    if options.trace and routing == "balanced":
        name = f"{options.trace.name.split('.')[0]}-{rate}-{axes_name(ep, etp)}-{ep * etp}.json.gz"
        write_trace(options.trace.with_name(name), runs[options.groups[-1], "linked"])
    return rows


def axes_name(ep: int, etp: int) -> str:
    return "both" if ep > 1 and etp > 1 else "ep" if ep > 1 else "etp"


def slowest(milliseconds: list[float]) -> list[float]:
    """Of all ranks, call by call."""
    if not dist.is_initialized():
        return milliseconds
    times = torch.tensor(milliseconds)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return times.tolist()


def dense_gemms(options: argparse.Namespace) -> Callable[[], None]:
    """``DENSE`` GEMMs of two matrices of 8192^2, about as long as the layer."""
    if not torch.cuda.is_available():
        return lambda: None
    a, b, out = (torch.randn(8192, 8192, device=options.device, dtype=options.dtype) for _ in range(3))

    def run() -> None:
        for _ in range(DENSE):
            torch.mm(a, b.T, out=out)

    return run


def one_rank(options: argparse.Namespace) -> dict:
    """All experts on one rank."""
    _, flops, inputs = make_inputs("balanced", 1, 1, options)
    layer, dense = one_call(expert_mlp, inputs, torch.randn_like(inputs[0])), dense_gemms(options)
    samples = [(milliseconds(layer), milliseconds(dense)) for _ in range(options.repeats + 1)][1:]
    ms, dense_ms = (statistics.median(times) for times in zip(*samples, strict=True))
    return {"ranks": 1, "ms": ms, "tflops": flops / ms / 1e9, "of_dense": flops / ms / (DENSE_FLOP / dense_ms)}


def write_trace(path: Path, run: Callable[[], object]) -> None:
    """A Chrome trace of one call, of what ran on the device, gzipped."""
    whole = path.with_suffix(".tmp")
    writes = not dist.is_initialized() or dist.get_rank() == 0

    def export(profile: torch.profiler.profile) -> None:
        if writes:
            profile.export_chrome_trace(str(whole))

    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA],
        schedule=torch.profiler.schedule(wait=0, warmup=1, active=1),
        on_trace_ready=export,  # later it has been cleared
    ) as profile:
        for _ in range(2):
            milliseconds(run)
            profile.step()
    if not writes:
        return
    events = json.loads(whole.read_text())["traceEvents"]
    whole.unlink()
    kept = [
        {key: event[key] for key in ("name", "ph", "ts", "dur", "pid", "tid")} | {"name": event["name"][:60]}
        for event in events
        if event.get("cat") in ("kernel", "gpu_memcpy")
    ]
    sending = {event["tid"] for event in kept if "nccl" in event["name"] or event["name"] == "_carry"}
    kept += [
        {"name": "thread_name", "ph": "M", "pid": event["pid"], "tid": event["tid"], "args": {"name": kind}}
        for event in {event["tid"]: event for event in kept}.values()
        for kind in ["transfers" if event["tid"] in sending else "GEMMs"]
    ]
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": kept}, file)


def plot(traces: list[Path], picture: Path) -> None:
    """GEMMs above, transfers below, over time, of traces that :func:`write_trace` wrote."""
    colors = {"transfer": "tab:red", "GEMM": "tab:blue", "other kernel": "tab:gray"}
    figure, axes = subplots(len(traces), 1, (10, 1.5 * len(traces) + 0.6), sharex=True)
    for axis, path in zip(axes, traces, strict=True):
        with gzip.open(path, "rt") as file:
            events = json.load(file)["traceEvents"]
        streams = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
        ran = [event for event in events if event["ph"] == "X" and "spin_kernel" not in event["name"]]
        begin = min(event["ts"] for event in ran)
        spans = {kind: [] for kind in colors}
        for event in ran:
            kind = "GEMM" if "gemm" in event["name"].lower() else "other kernel"
            kind = "transfer" if streams[event["tid"]] == "transfers" else kind
            if event["dur"] > 5:  # microseconds; less does not show
                spans[kind].append(((event["ts"] - begin) * 1e-3, event["dur"] * 1e-3))
        for kind, color in colors.items():
            height = (0 if kind == "transfer" else 1, 0.9)
            axis.broken_barh(spans[kind], height, color=color, edgecolor="white", linewidth=0.2, label=kind)
        axis.set_yticks([0.45, 1.45], ["transfers", "GEMMs"])
        axis.set_title(path.name.split(".")[0], fontsize=9)
    axes[-1].set_xlabel("milliseconds, forward and backward")
    save(figure, axes[0], picture)


def show(row: dict) -> None:
    text = "  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", choices=["nccl", "emulated"], default="emulated")
    parser.add_argument("--rate", choices=list(RATES), nargs="+", default=["nvlink"], help="of the emulated link")
    parser.add_argument("--sms", type=int, default=EXPERT_TRANSFER_CTAS, help="SMs that an emulated transfer occupies")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--axes", choices=["ep", "etp", "both"], nargs="+", default=["ep", "etp"])
    parser.add_argument("--routing", choices=["balanced", "skewed"], nargs="+", default=["balanced", "skewed"])
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tokens", type=int, default=16384, help="per GPU")
    parser.add_argument("--hidden", type=int, default=6144)
    parser.add_argument("--expert-hidden", type=int, default=9216)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--trace", type=Path, help="Chrome traces of balanced routing and most groups, FILE-*.json.gz")
    parser.add_argument("--plot", type=Path, nargs="+", metavar=("TRACE", "PICTURE"), help="draw what --trace wrote")
    options = parser.parse_args()
    if options.plot:
        *traces, picture = options.plot
        if not traces:
            parser.error(f"--plot {picture}: takes one trace or more, and then the picture")
        plot(traces, picture)
        return
    on_gpu = torch.cuda.is_available()
    options.device = "cuda" if on_gpu else "cpu"
    options.dtype = torch.bfloat16 if on_gpu else torch.float32
    if options.link == "nccl":
        ProcessEnvironment.detect().init_process_group(options.device, timedelta(seconds=60))
        options.ranks, options.rate = [dist.get_world_size()], ["nccl"]
    speaks = not dist.is_initialized() or dist.get_rank() == 0
    machine = torch.cuda.get_device_name() if on_gpu else "cpu"
    rates = ", ".join(
        f"{r} {RATES[r][0] * 1e6:.0f} us {RATES[r][1] / 1e9:.0f} GB/s" for r in options.rate if r in RATES
    )
    how = options.link if options.link == "nccl" else f"{options.link} {rates}, {options.sms} SMs"
    if speaks:
        print(f"{machine}, torch {torch.__version__}, {how}", flush=True)
    rows = [one_rank(options)] if options.link == "emulated" else []
    if rows:
        show(rows[0])
    for ranks in options.ranks:
        for axis in options.axes:
            sizes = {"ep": (ranks, 1), "etp": (1, ranks), "both": (ranks // 2, 2)}[axis]
            for routing in options.routing:
                for rate in options.rate:
                    for row in measure(*sizes, routing, rate, options):
                        rows.append(row)
                        if speaks:
                            show(row)
    if options.json and speaks:
        options.json.write_text(json.dumps({"machine": machine, "link": how, "rows": rows}))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
