"""Pipeline schedules: in which order each rank runs the passes of its stages, and when ranks send each other what.

Of the same table, which says who does what and not how, are made

* a simulated :func:`timeline`, from which the bubble follows,
* the :func:`program` of each rank: its passes, and between them its sends and receives.

PyTorch's own schedules (``torch.distributed.pipelining``) cut a batch along its first axis, infer shapes once per run,
and run one FSDP module per stage; here micro-batches come cut, with documents of their own and of another length in
another stage of the recipe. The orders are PyTorch's: ``Schedule1F1B`` and ``ScheduleInterleaved1F1B``, which follow
Narayanan et al., arXiv 2104.04473; ``ScheduleZBVZeroBubble``, arXiv 2401.10241, section 6; ``ScheduleDualPipeV``, which
follows DeepSeek's DualPipe, arXiv 2412.19437. Of the last one, the forward and the backward pass of a pair run one
after the other.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Schedule(NamedTuple):
    """What a schedule asks for.

    Attributes:
        parts: stages on every rank, at least.
        more: whether there may be more.
        micro_batches: of a step for each pipeline rank, at least.
        splits: whether gradients of weights have passes of their own. Then the two stages of a rank form a V: rank r
            has stages r and ``2 ranks - 1 - r``. Else stage s lies on rank ``s % ranks``.
    """

    parts: int
    more: bool = False
    micro_batches: int = 1
    splits: bool = False


SCHEDULES = {
    "1f1b": Schedule(1),
    "interleaved_1f1b": Schedule(2, more=True),
    "zero_bubble": Schedule(2, splits=True),
    "dualpipe_v": Schedule(2, micro_batches=2, splits=True),
}

FORWARD, BACKWARD, WEIGHTS = "F", "B", "W"


class Pass(NamedTuple):
    """A pass of a stage for one micro-batch: forward, or backward; where the schedule splits, the backward pass makes
    the gradients of inputs, and a pass of weights those of weights."""

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


def stages_of_rank(schedule: str, ranks: int, parts: int, rank: int) -> list[int]:
    """In the order of the model.

    Args:
        parts: stages on each rank.
    """
    if SCHEDULES[schedule].splits:
        return [rank, 2 * ranks - 1 - rank]
    return list(range(rank, ranks * parts, ranks))


def table(schedule: str, ranks: int, parts: int, micro_batches: int, *, forward_only: bool = False) -> Table:
    """Of one of :data:`SCHEDULES`.

    Args:
        parts: stages on each rank.
        micro_batches: as many as the schedule asks for, unless forward passes alone are wanted.
    """
    orders: Table = []
    for rank in range(ranks):
        stages = stages_of_rank(schedule, ranks, parts, rank)
        if forward_only:
            orders.append(_in_groups(FORWARD, stages, _groups(ranks, micro_batches)))
        elif schedule == "zero_bubble":
            orders.append(_zero_bubble(ranks, rank, stages, micro_batches))
        elif schedule == "dualpipe_v":
            orders.append(_dualpipe_v(ranks, rank, stages, micro_batches))
        else:
            orders.append(_one_forward_one_backward(ranks, rank, stages, micro_batches))
    return orders


def _groups(ranks: int, micro_batches: int) -> list[range]:
    """Of at least ``ranks`` micro-batches each, where there are as many."""
    groups = max(1, micro_batches // ranks)
    ends = [micro_batches * (i + 1) // groups for i in range(groups)]
    return [range(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


def _in_groups(kind: str, stages: Sequence[int], groups: Sequence[range]) -> list[Pass]:
    """Each group of micro-batches through one stage after the other."""
    return [Pass(kind, stage, i) for group in groups for stage in stages for i in group]


def _one_forward_one_backward(ranks: int, rank: int, stages: Sequence[int], micro_batches: int) -> list[Pass]:
    """A rank begins with as many forward passes as it takes until the first gradient can arrive, then one forward and
    one backward pass take turns. With several stages, groups of at least ``ranks`` micro-batches go through a stage
    each."""
    groups, parts = _groups(ranks, micro_batches), len(stages)
    forward, backward = _in_groups(FORWARD, stages, groups), _in_groups(BACKWARD, stages[::-1], groups)
    before = (parts - 1) * max(map(len, groups)) + (1 if parts == 1 else 2) * (ranks - 1 - rank)
    first, then = forward[:before], forward[before:]
    order = first + [each for pair in zip(then, backward, strict=False) for each in pair]
    return order + backward[len(then) :]


class _Order:
    """Passes of a rank's two stages, written as ``F0``, ``B1``, ``W1``; each kind takes the micro-batches in order."""

    def __init__(self, stages: Sequence[int]) -> None:
        self.passes: list[Pass] = []
        self._stages, self._next = stages, Counter[str]()

    def add(self, passes: str, times: int = 1) -> None:
        for name in passes.split() * times:
            self.passes.append(Pass(name[0], self._stages[int(name[1])], self._next[name]))
            self._next[name] += 1


def _zero_bubble(ranks: int, rank: int, stages: Sequence[int], micro_batches: int) -> list[Pass]:
    """As if there were ``2 ranks - 1`` micro-batches where there are fewer."""
    number, order = max(2 * ranks - 1, micro_batches), _Order(stages)
    order.add("F0", 2 * (ranks - rank) - 1)
    order.add("F1 F0", rank)
    order.add("F1 B1 W1", ranks - rank)
    order.add("F0 B0 W0 F1 B1 W1", number - 2 * ranks + 1 + rank)
    order.add("B0 W0 F1 B1 W1", ranks - 1 - rank)
    order.add("B0 B1", rank)
    order.add("B0 W0", ranks - rank)
    order.add("W1", rank)
    order.add("W0", rank)
    return [one for one in order.passes if one.micro_batch < micro_batches]


def _dualpipe_v(ranks: int, rank: int, stages: Sequence[int], micro_batches: int) -> list[Pass]:
    order = _Order(stages)
    order.add("F0", 2 * (ranks - 1 - rank))
    order.add("F0 F1", rank + 1)
    order.add("B1 W1 F1", ranks - 1 - rank)
    order.add("F0 B1 W1 F1 B0 W0", micro_batches - 2 * ranks + 1 + rank)
    order.add("B1 W1 F1 B0 W0", ranks - 1 - rank)
    # The weights' gradients of the later half of the last backward passes wait for the end.
    last = ["B1", "B0"] * (rank + 1)
    waiting = deque(last[rank + 1 :])
    for i, name in enumerate(last):
        order.add(name if i > rank else f"{name} W{name[1]}")
    for _ in range(ranks - 1 - rank):
        if waiting:
            order.add(f"W{waiting.popleft()[1]}")
        order.add("B0")
        waiting.append("B0")
    for name in waiting:
        order.add(f"W{name[1]}")
    return order.passes


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
    elif one.kind == WEIGHTS:
        yield one._replace(kind=BACKWARD)
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
    twice as long as the forward passes, or, where they are split, as long, as do the passes of weights. Each rank comes
    to a transfer when it has begun the passes that begin earlier. So ranks cannot wait for each other in a circle, even
    where the transfers of a process group run one by one, as NCCL's do; and no send stands behind a receive that is for
    later.
    """
    splits = any(one.kind == WEIGHTS for one in orders[rank])
    times = timeline(orders, lambda one: 2 if one.kind == BACKWARD and not splits else 1)
    last = max((one.stage for order in orders for one in order), default=0)
    rank_of = {one.stage: place for place, order in enumerate(orders) for one in order}
    ends = {timed.what: timed.end for each in times for timed in each}
    steps: list[tuple[float, int, Pass, Pass | Transfer]] = [
        (timed.begin, 1, timed.what, timed.what) for timed in times[rank]
    ]
    for target, order in enumerate(orders):
        for one in order:
            for before in _inputs(one, last):
                source = rank_of[before.stage]
                if source != target and rank in (source, target):
                    steps.append((ends[before], 0, one, Transfer(one, source, target)))
    return [step for *_, step in sorted(steps, key=lambda each: each[:3])]


def held(orders: Table, rank: int) -> Counter[int]:
    """Of how many micro-batches a rank holds the activations of each of its stages when these are most in all; where
    the backward pass is split, until the gradients of weights are made."""
    counts: Counter[int] = Counter()
    most: Counter[int] = Counter()
    frees = WEIGHTS if any(one.kind == WEIGHTS for one in orders[rank]) else BACKWARD
    for one in orders[rank]:
        counts[one.stage] += (one.kind == FORWARD) - (one.kind == frees)
        if counts.total() > most.total():
            most = counts.copy()
    return most


def deferred(orders: Table, rank: int) -> tuple[Counter[int], Counter[int]]:
    """When most gradients of weights wait on a rank, under a schedule that splits: of how many micro-batches it then
    holds the activations of each of its stages, and of how many what these gradients are made of."""
    counts = {FORWARD: Counter[int](), BACKWARD: Counter[int]()}
    most = Counter[int](), Counter[int]()
    for one in orders[rank]:
        if one.kind != WEIGHTS:
            counts[one.kind][one.stage] += 1
        if one.kind != FORWARD:
            counts[FORWARD if one.kind == BACKWARD else BACKWARD][one.stage] -= 1
        if counts[BACKWARD].total() > most[1].total():
            most = counts[FORWARD].copy(), counts[BACKWARD].copy()
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
