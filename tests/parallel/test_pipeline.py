"""Schedules of pipeline stages: their orders, their bubble, and that ranks cannot wait for each other in a circle."""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.pipelining.schedules import ScheduleDualPipeV, ScheduleInterleaved1F1B, ScheduleZBVZeroBubble

from minimax_train.parallel.pipeline import (
    SCHEDULES,
    Transfer,
    bubble,
    deferred,
    held,
    program,
    split_layers,
    stages_of_rank,
    table,
    timeline,
)

INTERLEAVED, ZERO_BUBBLE, DUALPIPE_V = "interleaved_1f1b", "zero_bubble", "dualpipe_v"
SIZES = [
    (name, ranks, parts, n)
    for ranks in (2, 3, 4)
    for name, parts in (("1f1b", 1), (INTERLEAVED, 2), (INTERLEAVED, 3), (ZERO_BUBBLE, 2), (DUALPIPE_V, 2))
    for n in (ranks * SCHEDULES[name].micro_batches, 2 * ranks + 1)
]


def _seconds(schedule):
    """A backward pass takes twice as long as a forward pass, its parts half of that each."""
    return lambda one: 2 if one.kind == "B" and not SCHEDULES[schedule].splits else 1


def _shown(order):
    return " ".join(f"{one.stage}{one.kind}{one.micro_batch}" for one in order)


def test_order_of_1f1b():
    assert list(map(_shown, table("1f1b", 3, 1, 4))) == [
        "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3",
        "1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3",
        "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3",
    ]


def test_order_of_zero_bubble():
    assert list(map(_shown, table(ZERO_BUBBLE, 2, 2, 3))) == [
        "0F0 0F1 0F2 3F0 3B0 3W0 3F1 3B1 3W1 0B0 0W0 3F2 3B2 3W2 0B1 0W1 0B2 0W2",
        "1F0 2F0 1F1 2F1 2B0 2W0 1F2 1B0 1W0 2F2 2B1 2W1 1B1 2B2 1B2 1W1 2W2 1W2",
    ]


def _orders_of_pytorch(kind, stages, micro_batches):
    """Of a schedule, a forward and a backward pass that it runs together one after the other, and a backward pass that
    it does not split in its two halves; given the stages of each rank."""
    passes = {"FORWARD": "F", "BACKWARD_INPUT": "B", "BACKWARD_WEIGHT": "W", "FULL_BACKWARD": "BW"}
    if kind is ScheduleInterleaved1F1B:
        passes["FULL_BACKWARD"] = "B"
    found = []
    for rank, own in enumerate(stages):
        parts = [
            SimpleNamespace(
                stage_index=stage,
                num_stages=sum(map(len, stages)),
                group_size=len(stages),
                group_rank=rank,
                is_first=stage == 0,
                is_last=False,
                has_backward=True,
                device=torch.device("cpu"),
                submod=torch.nn.Identity(),
            )
            for stage in own
        ]
        order = filter(None, kind(parts, micro_batches, loss_fn=lambda: None).pipeline_order[rank])
        each = [one for action in order for one in action.sub_actions or [action]]
        found.append(
            [(letter, x.stage_index, x.microbatch_index) for x in each for letter in passes[x.computation_type.name]]
        )
    return found


@pytest.mark.parametrize(
    ("schedule", "kind", "sizes"),
    [
        (INTERLEAVED, ScheduleInterleaved1F1B, [(2, 2, 6), (3, 2, 8), (4, 3, 4), (4, 2, 10)]),
        (ZERO_BUBBLE, ScheduleZBVZeroBubble, [(2, 2, 2), (3, 2, 5), (4, 2, 4), (4, 2, 11), (6, 2, 25)]),
        (DUALPIPE_V, ScheduleDualPipeV, [(2, 2, 4), (3, 2, 6), (4, 2, 8), (4, 2, 11), (6, 2, 25)]),
    ],
)
def test_order_is_that_of_pytorch(schedule, kind, sizes):
    for ranks, parts, micro_batches in sizes:
        stages = [stages_of_rank(schedule, ranks, parts, rank) for rank in range(ranks)]
        assert table(schedule, ranks, parts, micro_batches) == _orders_of_pytorch(kind, stages, micro_batches)


@pytest.mark.parametrize(("ranks", "parts", "micro_batches"), [(2, 1, 4), (4, 1, 16), (4, 2, 16), (8, 3, 32)])
def test_bubble_is_that_of_theory(ranks, parts, micro_batches):
    """(p - 1) / (v m + p - 1): section 2.2 of arXiv 2104.04473, which relates it to the ideal time."""
    schedule = INTERLEAVED if parts > 1 else "1f1b"
    times = timeline(table(schedule, ranks, parts, micro_batches), _seconds(schedule))
    assert bubble(times) == pytest.approx((ranks - 1) / (parts * micro_batches + ranks - 1))


@pytest.mark.parametrize("schedule", [ZERO_BUBBLE, DUALPIPE_V])
@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 4), (3, 7), (8, 32)])
def test_bubble_of_split_backward_passes_is_one_pass_per_rank(schedule, ranks, micro_batches):
    """Where all passes take as long as each other, each rank waits for ranks - 1 of them."""
    times = timeline(table(schedule, ranks, 2, micro_batches), _seconds(schedule))
    assert bubble(times) == pytest.approx((ranks - 1) / (6 * micro_batches + ranks - 1))


def _end_on_streams(orders, seconds):
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
            ends[step] = begin + (0 if isinstance(step, Transfer) else seconds(step))
    return max(ends.values())


@pytest.mark.parametrize("forward_only", [False, True])
def test_transfers_in_order_neither_hang_nor_add_a_bubble(forward_only):
    """Receives put before sends that are ready would add one."""
    few = [(INTERLEAVED, 4, 2, 1), (INTERLEAVED, 3, 3, 2), (ZERO_BUBBLE, 3, 2, 1)] if forward_only else []
    for schedule, ranks, parts, micro_batches in [*SIZES, *few]:
        orders = table(schedule, ranks, parts, micro_batches, forward_only=forward_only)
        kinds = "F" if forward_only else "FBW" if SCHEDULES[schedule].splits else "FB"
        assert sorted(one for order in orders for one in order) == sorted(
            (kind, stage, i) for kind in kinds for stage in range(ranks * parts) for i in range(micro_batches)
        )
        shortest = max(one.end for rank in timeline(orders, _seconds(schedule)) for one in rank)
        assert _end_on_streams(orders, _seconds(schedule)) == shortest, (schedule, ranks, parts, micro_batches)


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_first_stage_of_a_rank_comes_last(schedule):
    """When its last pass begins, the gradients of a rank's other stages are whole; micro-batches come in order."""
    parts = SCHEDULES[schedule].parts
    for rank, order in enumerate(table(schedule, 4, parts, 9)):
        last = "W" if SCHEDULES[schedule].splits else "B"
        assert order[-1] == (last, rank, 8)
        for stage in stages_of_rank(schedule, 4, parts, rank):
            assert [one.micro_batch for one in order if one[:2] == (last, stage)] == list(range(9))


def test_activations_held():
    """Of as many micro-batches as ranks follow, the own one included; interleaved of more; split until the end."""
    orders = table("1f1b", 4, 1, 8)
    assert [held(orders, rank) for rank in range(4)] == [{rank: 4 - rank} for rank in range(4)]
    assert held(table(INTERLEAVED, 4, 2, 8), 0) == {0: 7, 4: 4}
    for number in (8, 19):
        orders = table(ZERO_BUBBLE, 4, 2, number)
        assert [held(orders, rank).total() for rank in range(4)] == [8] * 4  # half as many layers each as with 1f1b
        orders = table(DUALPIPE_V, 4, 2, number)
        assert [held(orders, rank).total() for rank in range(4)] == [9] * 4


def test_gradients_of_weights_that_wait():
    """At most: after a rank's last backward passes in a row; and what it holds for backward passes to come."""
    for schedule, most in ((ZERO_BUBBLE, [1, 3, 5, 7]), (DUALPIPE_V, [1, 2, 3, 4])):
        orders = table(schedule, 4, 2, 11)
        found = [deferred(orders, rank) for rank in range(4)]
        assert [after.total() for _, after in found] == most
        assert [before.total() for before, _ in found] == [7, 2, 1, 0]
    assert deferred(table(ZERO_BUBBLE, 4, 2, 11), 3)[1] == {3: 4, 4: 3}


def test_layers_are_split_by_cost():
    assert split_layers([1.0] * 8, 4, 0.0, 0.0) == [2, 2, 2, 2]
    assert split_layers([1.0] * 7, 4, 0.0, 2.0) == [2, 2, 2, 1]  # the head is as costly as two layers
    assert split_layers([1.0] * 7, 3, 1.0, 1.0) == [2, 3, 2]
    assert split_layers([1, 1, 1, 5, 1, 1, 1, 5], 2, 0.0, 0.0) == [4, 4]
    assert split_layers([5, 1, 1, 1, 1, 1], 2, 0.0, 0.0) == [1, 5]
    assert split_layers([1.0] * 3, 3, 100.0, 0.0) == [1, 1, 1]
