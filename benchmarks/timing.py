"""Timing on one GPU, shared by the benchmarks."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch

T = TypeVar("T")
REPEATS = 15


def in_turn(runs: Iterable[T], repeat: int) -> list[T]:
    """The runs in the order of one repeat: every other goes backwards, so that none always follows a hungrier one."""
    return list(runs)[:: (-1) ** repeat]


def times(run: Callable[[], object], repeats: int = REPEATS, warm_up: int = 2) -> float:
    """Median milliseconds of ``run`` on the device."""
    for _ in range(warm_up):
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(marks))


def alternating_times(
    runs: Sequence[Callable[[], object]], repeats: int = REPEATS, *, before: Callable[[], object] | None = None
) -> list[float]:
    """Median milliseconds of each of several runs, made one call at a time, so that a GPU that slows down slows all.

    All ranks make the same number of calls. ``before`` runs before each of them and is not timed.
    """
    marks = [[tuple(torch.cuda.Event(enable_timing=True) for _ in "ab") for _ in runs] for _ in range(repeats + 1)]
    for repeat, of_repeat in enumerate(marks):
        for run, (begin, end) in in_turn(zip(runs, of_repeat, strict=True), repeat):
            if before is not None:
                before()
            begin.record()
            run()
            end.record()
    torch.cuda.synchronize()
    by_run = zip(*marks[1:], strict=True)  # the first repeat warms up
    return [statistics.median(a.elapsed_time(b) for a, b in of_run) for of_run in by_run]


def times_in_turns(runs: Mapping[str, Callable[[], object]], turn_ms: float = 300, rounds: int = 5) -> dict[str, float]:
    """Milliseconds of each on the device, the median over turns that each takes among the others.

    GEMMs run fastest in their first tens of milliseconds, until the power limit lowers the clock: those that are
    compared must run at the same one. The first round only warms up.
    """
    turns = {name: [] for name in runs}
    counts = dict.fromkeys(runs, 1)
    for round_ in range(rounds + 1):
        for name, run in in_turn(runs.items(), round_):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(counts[name]):
                run()
            end.record()
            torch.cuda.synchronize()
            turns[name].append(begin.elapsed_time(end) / counts[name])
            counts[name] = max(1, round(turn_ms / turns[name][-1]))
    return {name: statistics.median(values[1:]) for name, values in turns.items()}


def kernel_times(runs: Sequence[Callable[[], object]], calls: int = 4, rounds: int = 3) -> list[float]:
    """Milliseconds that the kernels of one call take, of each of several runs that take turns; gaps are left out."""
    device = torch.autograd.DeviceType.CUDA
    of_run: list[list[float]] = [[] for _ in runs]
    for round_ in range(rounds + 1):
        for run, found in in_turn(zip(runs, of_run, strict=True), round_):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                for _ in range(calls):
                    run()
                torch.cuda.synchronize()
            spans = [e.time_range.elapsed_us() for e in profile.events() or () if e.device_type == device]
            found.append(sum(spans) / calls * 1e-3)
    return [statistics.median(found[1:]) for found in of_run]  # the first round warms up


def graph_times(run: Callable[[], object]) -> float:
    """The same for a captured graph of ``run``: no launch is waited for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return times(graph.replay)


def copy_rate() -> float:
    """Bytes read and written per second by a device-to-device copy of 2 GiB."""
    source = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (times(lambda: target.copy_(source)) * 1e-3)


def gemm(M: int, N: int, K: int) -> Callable[[], torch.Tensor]:
    """One dense bfloat16 GEMM ``[M, K] x [K, N]`` of random numbers."""
    a, b = (torch.randn(rows, K, device="cuda", dtype=torch.bfloat16) for rows in (M, N))
    return lambda: a @ b.T


def gemm_rate(M: int, N: int, K: int) -> float:
    """FLOP per second of :func:`gemm`, of its first ten."""
    return 2 * M * N * K / (times(gemm(M, N, K), repeats=8) * 1e-3)


def extra_memory(run: Callable[[], tuple[torch.Tensor, ...]]) -> int:
    """Bytes ``run`` holds at its peak beyond what there was before and the tensors it returns."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = run()
    return torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in results)


@dataclass(frozen=True)
class Occupancy:
    """What ran on a GPU, of a time from the first kernel's begin to the last one's end.

    Attributes:
        busy: share of the time in which a kernel or a copy ran that is not NCCL's.
        whole_us: that time, in microseconds.
        exposed: share in which NCCL's kernels ran and nothing else.
        exposed_us: the same in microseconds, by NCCL's kernel: of those that ran, the one that had begun first.
        launches: kernels and copies.
    """

    whole_us: float
    busy: float
    exposed: float
    exposed_us: dict[str, float]
    launches: int

    @classmethod
    def of(cls, recorded: torch.profiler.profile) -> Occupancy:
        device = torch.autograd.DeviceType.CUDA
        events = [e for e in recorded.events() or () if e.device_type == device]
        return cls.of_spans([(e.name, e.time_range.start, e.time_range.end) for e in events])

    @classmethod
    def of_spans(cls, spans: Sequence[tuple[str, float, float]]) -> Occupancy:
        """Of the names, begins and ends, in microseconds, of what ran, in any order."""
        lasting = [(i, start, end) for i, (_, start, end) in enumerate(spans) if start < end]
        edges = sorted(edge for i, start, end in lasting for edge in ((start, 1, i), (end, -1, i)))
        running, collectives, busy, exposed_us = 0, dict[int, None](), 0.0, defaultdict[str, float](float)
        for (at, change, i), (until, *_) in pairwise(edges):
            if "nccl" not in spans[i][0].lower():
                running += change
            elif change > 0:
                collectives[i] = None
            else:
                del collectives[i]
            if running:
                busy += until - at
            elif collectives:
                exposed_us[spans[next(iter(collectives))][0]] += until - at
        whole = edges[-1][0] - edges[0][0] if edges else float("nan")
        return cls(whole, busy / whole, sum(exposed_us.values()) / whole, dict(exposed_us), len(spans))
