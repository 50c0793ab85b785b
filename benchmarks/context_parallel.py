"""Context parallelism against the same tokens on one GPU, without it.

    python benchmarks/context_parallel.py --link emulated --ranks 2 4 8 [--tokens 131072] [--json FILE]
    torchrun --nproc-per-node 2 benchmarks/context_parallel.py --link nccl --ranks 2

Emulated, one GPU plays every rank in turn over ``benchmarks/link.py``; the slowest rank's time counts. Lightning
attention: forward + backward of LASP+, scan and the serial ring at ``--tokens`` per GPU, against one kernel call on as
many tokens of one document ("alone"): "ratio" of the median and "worst" of all ranks, and "free", what the ratio would
be if transfers took no time; with ``--kernels`` also the ratio of the kernels' own times. Softmax attention: FLOP/s of
ring and all-gather, zigzag, against one kernel call with as much work on one document. Calls that are compared are made
in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from link import RATES, EmulatedLink, FreeLink
from timing import alternating_times, kernel_times

from minimax_train.documents import Documents
from minimax_train.kernels.lightning import lightning_attention, lightning_slopes
from minimax_train.kernels.softmax import softmax_attention
from minimax_train.parallel.communicator import Communicator, GroupCommunicator, transfer_options
from minimax_train.parallel.context.layout import SequenceLayout
from minimax_train.parallel.context.lightning import SCAN_PIECES, count_short_memory_heads, lightning_attention_cp
from minimax_train.parallel.context.softmax import softmax_attention_cp

HEADS, KV_HEADS, DIM = 64, 8, 128

LIGHTNING_RUNS = [("lasp_plus", "contiguous"), ("lasp_plus", "zigzag"), ("scan", "contiguous"), ("ring", "contiguous")]


def median_ms(options: argparse.Namespace, *runs: Callable[[], object]) -> list[float]:
    """Median device milliseconds of each run, made in turn, all ranks together; on a CPU runs are not timed."""
    if not torch.cuda.is_available():
        for run in runs:
            run()
        return [float("nan")] * len(runs)
    together = None
    if options.link == "nccl":
        mark = torch.zeros(1, device=options.device)
        together = partial(dist.all_reduce, mark)  # a rank that comes early would wait for the others inside a run
    return alternating_times(runs, options.repeats, before=together)


def kernels_ms(options: argparse.Namespace, *runs: Callable[[], object]) -> list[float]:
    """Milliseconds that the kernels of each run take, if asked for."""
    asked = options.kernels and torch.cuda.is_available()
    return kernel_times(runs) if asked else [float("nan")] * len(runs)


def forward_backward(attend: Callable, inputs: list[torch.Tensor]) -> Callable[[], object]:
    grad = torch.randn_like(inputs[0])

    def run() -> object:
        return torch.autograd.grad(attend(*inputs), inputs, grad)

    return run


def make_inputs(tokens: int, heads: tuple[int, int, int], options: argparse.Namespace) -> list[torch.Tensor]:
    return [
        torch.randn(tokens, h, options.dim, device=options.device, dtype=options.dtype).requires_grad_() for h in heads
    ]


def mixes(tokens: int) -> dict[str, list[int]]:
    """One document over everything, and random ones of some 8,000 tokens."""
    cuts = sorted(random.Random(0).sample(range(1, tokens), max(1, tokens // 8192)))
    packed = [b - a for a, b in pairwise([0, *cuts, tokens])]
    return {"one document": [tokens], f"{len(packed)} documents": packed}


def communicators(options: argparse.Namespace, ranks: int, **emulated: Any) -> list[Communicator]:
    """The ranks this process plays: itself over NCCL, every one in turn when emulated."""
    if options.link == "nccl":
        world: Any = dist.group.WORLD  # there is one
        return [GroupCommunicator(world)]
    latency, rate = RATES[options.rate]
    return [EmulatedLink(rank, ranks, latency, rate, options.sms, **emulated) for rank in range(ranks)]


def free_links(options: argparse.Namespace, ranks: int) -> list[Communicator]:
    """The same ranks, over links whose transfers take no more than a local copy."""
    mine = [dist.get_rank()] if options.link == "nccl" else range(ranks)
    return [FreeLink(rank, ranks) for rank in mine]


def of_all_ranks(options: argparse.Namespace, mine: list[list[float]]) -> list[list[float]]:
    """Figures by rank, from those of the ranks this process plays; returned by figure."""
    if options.link == "nccl":
        by_process: list[list] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(by_process, mine)
        mine = [figures for of_process in by_process for figures in of_process]
    return [list(of_figure) for of_figure in zip(*mine, strict=True)]


def lightning_rows(options: argparse.Namespace, layer: int) -> Iterator[dict]:
    tokens, place = options.tokens, {"op": "lightning", "layer": layer}
    slopes = lightning_slopes(options.heads, layer, 80).to(options.device)
    inputs = make_inputs(tokens, (options.heads,) * 3, options)
    local = Documents.from_lengths([tokens], options.device)

    def alone(q, k, v):
        return lightning_attention(q, k, v, slopes, local)[0]

    for ranks in options.ranks:
        for mix, lengths in mixes(tokens * ranks).items():
            whole = Documents.from_lengths(lengths, options.device)
            for method, kind in LIGHTNING_RUNS:
                layout = SequenceLayout(kind, ranks)
                pieces = 1
                if method == "scan":
                    chunk_size = layout.shard(whole, 0).chunk_size
                    short = count_short_memory_heads(slopes, chunk_size, torch.float32)
                    pieces = max(1, min(SCAN_PIECES, options.heads - short))

                def attend(link, layout=layout, whole=whole, method=method):
                    shard = layout.shard(whole, link.rank)

                    def of_rank(q, k, v):
                        return lightning_attention_cp(q, k, v, slopes, shard, link, method=method)

                    return of_rank

                links = communicators(options, ranks, pieces=pieces, chained=method != "lasp_plus")
                times = []
                for link, free in zip(links, free_links(options, ranks), strict=True):
                    runs = [forward_backward(f, inputs) for f in (alone, attend(link), attend(free))]
                    times.append(median_ms(options, *runs) + kernels_ms(options, runs[0], runs[2]))
                base, ms, free, base_kernels, kernels = of_all_ranks(options, times)
                of_kernels = statistics.median(a / b for a, b in zip(kernels, base_kernels, strict=True))
                yield (
                    {**place, "method": method, "layout": kind, "ranks": ranks, "mix": mix}
                    | {
                        "alone": max(base),
                        "ms": max(ms),
                        "ratio": statistics.median(a / b for a, b in zip(ms, base, strict=True)),
                        "worst": max(a / b for a, b in zip(ms, base, strict=True)),
                        "free": statistics.median(a / b for a, b in zip(free, base, strict=True)),
                    }
                    | ({"kernels": of_kernels} if options.kernels else {})
                )


def softmax_rows(options: argparse.Namespace) -> Iterator[dict]:
    tokens, scale = options.softmax_tokens, options.dim**-0.5
    heads = (options.heads, options.kv_heads, options.kv_heads)
    inputs = make_inputs(tokens, heads, options)

    def rate(pairs: int, milliseconds: float) -> float:
        return 14 * pairs * options.heads * options.dim / milliseconds / 1e9  # TFLOP/s: 2 GEMMs forward, 5 backward

    for ranks in options.ranks:
        # As much work as each rank has on one document over all of them.
        length = round(tokens * ranks**0.5)
        document, longer = Documents.from_lengths([length], options.device), make_inputs(length, heads, options)

        def alone(q, k, v, document=document):
            return softmax_attention(q, k, v, document, scale=scale)[0]

        for mix, lengths in mixes(tokens * ranks).items():
            whole = Documents.from_lengths(lengths, options.device)
            work = sum(n * (n + 1) // 2 for n in lengths) // ranks  # of the average rank

            def attend(link, method, whole=whole, ranks=ranks):
                shard = SequenceLayout("zigzag", ranks).shard(whole, link.rank)

                def of_rank(q, k, v):
                    return softmax_attention_cp(q, k, v, shard, link, scale=scale, method=method)

                return of_rank

            times = [
                median_ms(
                    options,
                    forward_backward(alone, longer),
                    *(forward_backward(attend(link, method), inputs) for method in options.softmax_methods),
                )
                for link in communicators(options, ranks)
            ]
            base, *by_method = of_all_ranks(options, times)
            base_rate = rate(length * (length + 1) // 2, max(base))
            for method, ms in zip(options.softmax_methods, by_method, strict=True):
                flops = rate(work, max(ms))
                yield {"op": "softmax", "method": method, "layout": "zigzag", "ranks": ranks, "mix": mix} | {
                    "alone": max(base),
                    "ms": max(ms),
                    "tflops": flops,
                    "ratio": flops / base_rate,
                    "balance": max(ms) / statistics.mean(ms),
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", choices=["nccl", "emulated"], default="emulated")
    parser.add_argument("--rate", choices=list(RATES), default="nvlink", help="of the emulated link")
    parser.add_argument("--sms", type=int, default=8, help="SMs an emulated transfer occupies")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--ops", nargs="+", choices=["lightning", "softmax"], default=["lightning", "softmax"])
    parser.add_argument("--tokens", type=int, default=131072, help="per GPU, lightning attention")
    parser.add_argument("--softmax-tokens", type=int, default=65536, help="per GPU, softmax attention")
    parser.add_argument("--softmax-methods", nargs="+", choices=["ring", "allgather"], default=["ring", "allgather"])
    parser.add_argument("--layers", type=int, nargs="+", default=[0], help="of 80: the deeper, the slower the decay")
    parser.add_argument("--kernels", action="store_true", help="also add up kernel times, by a profiler")
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument("--kv-heads", type=int, default=KV_HEADS)
    parser.add_argument("--dim", type=int, default=DIM)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if options.link == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl", device_id=device, pg_options=transfer_options())
        options.ranks = [dist.get_world_size()]
    options.device = "cuda" if on_gpu else "cpu"
    options.dtype = torch.bfloat16 if on_gpu else torch.float32
    machine = torch.cuda.get_device_name() if on_gpu else "cpu"
    latency, rate = RATES[options.rate]
    how = f"emulated {options.rate}: {latency * 1e6:.0f} us, {rate / 1e9:.0f} GB/s, {options.sms} SMs"
    if options.link == "emulated" or dist.get_rank() == 0:
        print(f"{machine}, torch {torch.__version__}, {how if options.link == 'emulated' else 'nccl'}")
    rows, is_first = [], options.link == "emulated" or dist.get_rank() == 0
    measured = [lightning_rows(options, layer) for layer in options.layers] if "lightning" in options.ops else []
    measured += [softmax_rows(options)] if "softmax" in options.ops else []
    for row in chain(*measured):
        rows.append(row)
        if is_first:
            print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    if options.json and is_first:
        options.json.write_text(json.dumps({"machine": machine, "link": how, "rows": rows}))
    if options.link == "nccl":
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
