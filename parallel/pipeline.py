"""Pipeline schedules: in which order each rank runs the passes of its stages, and when ranks send each other what.

Stage s lies on rank ``s % ranks``. Of the same table, which says who does what and not how, are made

* a simulated :func:`timeline`, from which the bubble follows,
* the :func:`program` of each rank: its passes, and between them its sends and receives.

PyTorch's own schedules (``torch.distributed.pipelining``) cut a batch along its first axis, infer shapes once per run,
and run one FSDP module per stage; here micro-batches come cut, with documents of their own and of another length in
another stage of the recipe. The orders are PyTorch's (``Schedule1F1B``, ``ScheduleInterleaved1F1B``), which follow
Narayanan et al., arXiv 2104.04473.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

SCHEDULES = {"1f1b": 1, "interleaved_1f1b": 2}
"""By name the fewest stages on every rank; ``1f1b`` has just one."""

FORWARD, BACKWARD = "F", "B"


class Pass(NamedTuple):
    """The forward or backward pass of a stage for one micro-batch."""

    kind: str
    stage: int
    micro_batch: int


class Transfer(NamedTuple):
    """What the pass of a stage is given by that of the stage before, or of the one after in the backward pass.

    Attributes:
        needed_by: the pass.
        source, target: ranks.
    """

    needed_by: Pass
    source: int
    target: int


Table = list[list[Pass]]
"""The passes of each rank in their order."""


def table(ranks: int, parts: int, micro_batches: int, *, forward_only: bool = False) -> Table:
    """1F1B, of several stages on each rank interleaved.

    A rank begins with as many forward passes as it takes until the first gradient can arrive, then one forward and one
    backward pass take turns. Interleaved, groups of at least ``ranks`` micro-batches go through a stage each.

    Args:
        parts: stages on each rank.
        micro_batches: at least as many as ranks, unless forward passes alone are wanted.
    """
    groups = max(1, micro_batches // ranks)
    ends = [micro_batches * (i + 1) // groups for i in range(groups)]
    group_of = [range(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
    longest = max(map(len, group_of))
    orders: Table = []
    for rank in range(ranks):
        stages = range(rank, ranks * parts, ranks)
        forward = [Pass(FORWARD, stage, i) for group in group_of for stage in stages for i in group]
        backward = [Pass(BACKWARD, stage, i) for group in group_of for stage in stages[::-1] for i in group]
        if forward_only:
            orders.append(forward)
            continue
        before = (parts - 1) * longest + (1 if parts == 1 else 2) * (ranks - 1 - rank)
        first, then = forward[:before], forward[before:]
        order = first + [each for pair in zip(then, backward, strict=False) for each in pair]
        orders.append(order + backward[len(then) :])
    return orders


class Timed(NamedTuple):
    """A pass, and when it begins and ends."""

    what: Pass
    begin: float
    end: float


def timeline(orders: Table, seconds: Callable[[Pass], float]) -> list[list[Timed]]:
    """When each pass of each rank runs, transfers taking no time.

    Raises:
        AssertionError: when some passes wait for each other.
    """
    ranks = len(orders)
    last = max((one.stage for order in orders for one in order), default=0)
    ends: dict[Pass, float] = {}
    found: list[list[Timed]] = [[] for _ in orders]
    moved = True
    while moved:
        moved = False
        for rank in range(ranks):
            while len(found[rank]) < len(orders[rank]):
                one = orders[rank][len(found[rank])]
                inputs = list(_inputs(one, last))
                if any(each not in ends for each in inputs):
                    break
                free = found[rank][-1].end if found[rank] else 0.0
                begin = max([free, *(ends[each] for each in inputs)])
                ends[one] = begin + seconds(one)
                found[rank].append(Timed(one, begin, ends[one]))
                moved = True
    assert all(len(a) == len(b) for a, b in zip(found, orders, strict=True)), "passes wait for each other"
    return found


def _inputs(one: Pass, last: int) -> Iterator[Pass]:
    """The passes that must be done before."""
    if one.kind == FORWARD:
        if one.stage > 0:
            yield one._replace(stage=one.stage - 1)
    else:
        yield one._replace(kind=FORWARD)
        if one.stage < last:
            yield one._replace(stage=one.stage + 1)


def bubble(times: Sequence[Sequence[Timed]]) -> float:
    """Share of all ranks' time, from the first pass to the last, in which they wait."""
    busy = sum(one.end - one.begin for rank in times for one in rank)
    return 1 - busy / (len(times) * max(one.end for rank in times for one in rank))


def program(orders: Table, rank: int) -> list[Pass | Transfer]:
    """What a rank does, in order: its passes, and the transfers that it takes part in.

    All transfers have one order, that of the moments at which they can begin in a timeline whose backward passes take
    twice as long as the forward passes. Each rank comes to a transfer when it has begun the passes that begin earlier.
    So ranks cannot wait for each other in a circle, even where the transfers of a process group run one by one, as
    NCCL's do; and no send stands behind a receive that is for later.
    """
    times = timeline(orders, lambda one: 1 if one.kind == FORWARD else 2)
    last = max((one.stage for order in orders for one in order), default=0)
    ends = {timed.what: timed.end for each in times for timed in each}
    steps: list[tuple[float, int, Pass, Pass | Transfer]] = [
        (timed.begin, 1, timed.what, timed.what) for timed in times[rank]
    ]
    for target, order in enumerate(orders):
        for one in order:
            for before in _inputs(one, last):
                if before.stage != one.stage:
                    source = before.stage % len(orders)
                    if rank in (source, target):
                        steps.append((ends[before], 0, one, Transfer(one, source, target)))
    return [step for *_, step in sorted(steps, key=lambda each: each[:3])]


def held(orders: Table, rank: int) -> Counter[int]:
    """Of how many micro-batches a rank holds the activations of each of its stages when these are most in all."""
    counts: Counter[int] = Counter()
    most: Counter[int] = Counter()
    for one in orders[rank]:
        counts[one.stage] += 1 if one.kind == FORWARD else -1
        if counts.total() > most.total():
            most = counts.copy()
    return most


def split_layers(costs: Sequence[float], stages: int, before: float, after: float) -> list[int]:
    """Into how many layers each stage gets, so that the most costly stage costs as little as it can.

    What is minimised is the sum of the stages' costs to the eighth power: nearly the greatest, and of equals the even
    split.

    Args:
        costs: of each layer.
        before, after: of what the first stage computes before its layers, and the last after them.
    """
    sums = np.concatenate([[0.0], np.cumsum(costs)])
    unit = sums[-1] / stages or 1.0
    none = np.where(np.tri(len(sums), dtype=bool), np.inf, 0.0)  # a stage of the layers from row to column has one
    best, begins = np.where(np.arange(len(sums)) == 0, 0.0, np.inf), list[np.ndarray]()
    for stage in range(stages):
        extra = before * (stage == 0) + after * (stage == stages - 1)
        total = best[:, None] + np.abs((sums[None, :] - sums[:, None] + extra) / unit) ** 8 + none
        begins.append(total.argmin(0))
        best = total.min(0)
    sizes, end = list[int](), len(costs)
    for begin_of in reversed(begins):
        begin = int(begin_of[end])
        sizes.append(end - begin)
        end = begin
    return sizes[::-1]
