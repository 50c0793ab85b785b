"""Schedules of pipeline stages: their orders, their bubble, and that ranks cannot wait for each other in a circle."""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B

from minimax_train.parallel.pipeline import Transfer, bubble, held, program, split_layers, table, timeline

SIZES = [(ranks, parts, n) for ranks in (2, 3, 4) for parts in (1, 2, 3) for n in (ranks, 2 * ranks + 1)]


def _seconds(one):
    return 1 if one.kind == "F" else 2


def _shown(order):
    return " ".join(f"{one.stage}{one.kind}{one.micro_batch}" for one in order)


def test_order_of_1f1b():
    assert list(map(_shown, table(3, 1, 4))) == [
        "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3",
        "1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3",
        "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3",
    ]


@pytest.mark.parametrize(("ranks", "parts", "micro_batches"), [(2, 2, 6), (3, 2, 8), (4, 3, 4), (4, 2, 10)])
def test_interleaved_order_is_that_of_pytorch(ranks, parts, micro_batches):
    stages = [
        SimpleNamespace(
            stage_index=part * ranks,
            num_stages=ranks * parts,
            group_size=ranks,
            group_rank=0,
            is_first=part == 0,
            is_last=False,
            has_backward=True,
            device=torch.device("cpu"),
            submod=torch.nn.Identity(),
        )
        for part in range(parts)
    ]
    theirs = ScheduleInterleaved1F1B(stages, micro_batches, loss_fn=lambda: None).pipeline_order
    expected = [" ".join(map(str, filter(None, theirs[rank]))) for rank in range(ranks)]
    assert list(map(_shown, table(ranks, parts, micro_batches))) == expected


@pytest.mark.parametrize(("ranks", "parts", "micro_batches"), [(2, 1, 4), (4, 1, 16), (4, 2, 16), (8, 3, 32)])
def test_bubble_is_that_of_theory(ranks, parts, micro_batches):
    """(p - 1) / (v m + p - 1): section 2.2 of arXiv 2104.04473, which relates it to the ideal time."""
    times = timeline(table(ranks, parts, micro_batches), _seconds)
    assert bubble(times) == pytest.approx((ranks - 1) / (parts * micro_batches + ranks - 1))


def _end_on_streams(orders):
    """When a step ends whose transfers are given to one stream of each kind on each rank: a transfer begins when both
    its ranks have come to it, and have run the passes and the transfers of its kind that they were given before."""
    programs = [program(orders, rank) for rank in range(len(orders))]
    waits = {}  # a step: what must have ended before
    for steps in programs:
        before = {}
        for step in steps:
            kind = step.needed_by.kind if isinstance(step, Transfer) else "pass"
            after = {before.get("pass"), before.get(kind)} - {None}
            waits.setdefault(step, set()).update(after)
            before[kind] = step
    for steps in programs:
        for step in steps:
            if isinstance(step, Transfer):
                waits[step.needed_by].add(step)
    ends = {}
    while len(ends) < len(waits):
        ready = [s for s in waits if s not in ends and waits[s] <= ends.keys()]
        assert ready, "ranks wait for each other"
        for step in ready:
            begin = max((ends[each] for each in waits[step]), default=0)
            ends[step] = begin + (0 if isinstance(step, Transfer) else _seconds(step))
    return max(ends.values())


@pytest.mark.parametrize("forward_only", [False, True])
def test_transfers_in_order_neither_hang_nor_add_a_bubble(forward_only):
    """Receives put before sends that are ready would add one."""
    for ranks, parts, micro_batches in [*SIZES, *([(4, 2, 1), (3, 3, 2)] if forward_only else [])]:
        orders = table(ranks, parts, micro_batches, forward_only=forward_only)
        assert sorted(one for order in orders for one in order) == sorted(
            (kind, stage, i)
            for kind in ("F" if forward_only else "FB")
            for stage in range(ranks * parts)
            for i in range(micro_batches)
        )
        shortest = max(one.end for rank in timeline(orders, _seconds) for one in rank)
        assert _end_on_streams(orders) == shortest, (ranks, parts, micro_batches)


def test_activations_held():
    """Of as many micro-batches as ranks follow, the own one included; interleaved of more."""
    orders = table(4, 1, 8)
    assert [held(orders, rank) for rank in range(4)] == [{rank: 4 - rank} for rank in range(4)]
    assert held(table(4, 2, 8), 0) == {0: 7, 4: 4}


def test_layers_are_split_by_cost():
    assert split_layers([1.0] * 8, 4, 0.0, 0.0) == [2, 2, 2, 2]
    assert split_layers([1.0] * 7, 4, 0.0, 2.0) == [2, 2, 2, 1]  # the head is as costly as two layers
    assert split_layers([1.0] * 7, 3, 1.0, 1.0) == [2, 3, 2]
    assert split_layers([1, 1, 1, 5, 1, 1, 1, 5], 2, 0.0, 0.0) == [4, 4]
    assert split_layers([5, 1, 1, 1, 1, 1], 2, 0.0, 0.0) == [1, 5]
    assert split_layers([1.0] * 3, 3, 100.0, 0.0) == [1, 1, 1]
