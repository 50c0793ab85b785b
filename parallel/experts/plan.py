"""Which row goes where: groups, counts, and the order rows arrive in.

A *column* is one of a rank's experts with one part of the tokens; by expert, then by part. A *group* is some columns
in a row, the same of every rank, so that its rows are contiguous both at home and in the buffer of arranged rows. A
*label* is a place in the order of rows at home: group, rank, column.

Shape legend: T tokens, K choices per token, L labels, E experts, J etp ranks, I ep ranks, P parts of the tokens,
C columns, c those of a group, e experts of this rank, R rows at home, N rows of a group as they arrive, m its arranged
rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from minimax_train.parallel.experts.lanes import Lane, mark


@dataclass(frozen=True)
class Cut:
    """How rows are cut in groups, the same on all ranks."""

    num_experts: int
    ep: int
    groups: int

    @property
    def local_experts(self) -> int:
        return self.num_experts // self.ep

    @cached_property
    def shares(self) -> list[int]:
        """How much of a rank's tokens or rows each group has: little in the first and last, whose transfers show."""
        return [1, *[2] * (self.groups - 2), 1][: self.groups]

    @property
    def token_parts(self) -> int:
        """Only as many as it takes for a column to be no more than the smallest share."""
        return -(-sum(self.shares) // self.local_experts)

    @property
    def num_columns(self) -> int:
        return self.local_experts * self.token_parts

    @cached_property
    def columns(self) -> list[slice]:
        """Of each group, at least one."""
        return self.split(self.num_columns)

    def split(self, size: int) -> list[slice]:
        """A range in the groups' shares, as nearly as it goes."""
        total = sum(self.shares)
        ends = [(2 * size * done + total) // (2 * total) for done in accumulate(self.shares)]
        return [slice(*edges) for edges in pairwise([0, *ends])]

    def experts(self, columns: slice) -> slice:
        """This rank's experts that some columns belong to."""
        return slice(columns.start // self.token_parts, -(-columns.stop // self.token_parts))

    @cached_property
    def order(self) -> list[tuple[int, int]]:
        """Expert and part of the tokens of each label."""
        e, P = self.local_experts, self.token_parts
        return [
            (rank * e + column // P, column % P)
            for columns in self.columns
            for rank in range(self.ep)
            for column in range(columns.start, columns.stop)
        ]

    def labels(self, experts_TK: Tensor) -> tuple[Tensor, int]:
        """The label of each choice, -1 for none, and how many labels there are."""
        T = len(experts_TK)
        part_T = torch.arange(T, device=experts_TK.device) * self.token_parts // max(T, 1)
        return _label_of(self, experts_TK.device)[experts_TK, part_T[:, None]], len(self.order)


@dataclass(frozen=True)
class Group:
    """One group's rows, on this rank.

    Attributes:
        home: its rows before they are sent and after they have come back.
        sends, receives: rows to and from each ep rank.
        padded: rows that every etp rank gives: the most that any of them received.
        here: its arranged rows.
        columns: whose rows they are.
        experts: the same, of this rank's experts.
        arrives_arranged: whether rows arrive sorted by expert and without gaps.
    """

    home: slice
    sends: list[int]
    receives: list[int]
    padded: int
    here: slice
    columns: slice
    experts: slice
    arrives_arranged: bool

    @property
    def num_rows(self) -> int:
        return self.here.stop - self.here.start


class Order(NamedTuple):
    """Between rows as they arrive and rows by expert; both directions are gathers.

    Attributes:
        source_m: which arrived row each arranged row is.
        place_N: which arranged row each arrived row is; 0 for padding.
    """

    source_m: Tensor
    place_N: Tensor


@dataclass(frozen=True)
class Plan:
    """All groups, and what the device needs to arrange their rows. Made in the forward pass, used in both.

    Attributes:
        counts_JIC: rows from each rank of the expert grid in each column, on the device.
        token_parts: P.
        rows_here: arranged rows of all groups, M.
    """

    groups: list[Group]
    counts_JIC: Tensor
    token_parts: int
    rows_here: int

    @cached_property
    def offsets_e(self) -> Tensor:
        """End of each expert's rows among the arranged rows, int32."""
        return self.counts_JIC.sum((0, 1)).view(-1, self.token_parts).sum(1).cumsum(0).int()

    def offsets(self, group: Group) -> Tensor:
        """End of each expert's rows among those of a group, which may have a part of the first and the last."""
        return self.offsets_e[group.experts].clamp(max=group.here.stop) - group.here.start

    @cached_property
    def orders(self) -> list[Order | None]:
        """Per group; None where rows arrive in order."""
        return [None if group.arrives_arranged else self._order(group) for group in self.groups]

    def _order(self, group: Group) -> Order:
        counts_JIc = self.counts_JIC[:, :, group.columns]
        J, device = len(counts_JIc), counts_JIc.device
        # Runs of rows of one expert from one rank: they arrive by (j, i, c), and are arranged by (c, j, i).
        arrival_JX = counts_JIc.flatten(1)
        starts_JX = arrival_JX.cumsum(1) - arrival_JX + group.padded * torch.arange(J, device=device)[:, None]
        starts_S = starts_JX.view_as(counts_JIc).permute(2, 0, 1).flatten()
        counts_S = counts_JIc.permute(2, 0, 1).flatten()
        moved_S = starts_S - (counts_S.cumsum(0) - counts_S)
        places_m = torch.arange(group.num_rows, device=device)
        source_m = places_m + moved_S.repeat_interleave(counts_S, output_size=group.num_rows)
        return Order(source_m, places_m.new_zeros(J * group.padded).scatter_(0, source_m, places_m))


@dataclass
class PendingPlan:
    """Counts on their way to the host."""

    wait: Callable[[], Plan]


def start_plan(cut: Cut, offsets_L: Tensor, ep: Lane, etp: Lane) -> PendingPlan:
    """Start telling all ranks of the expert grid, and the host, how many rows go where.

    Args:
        offsets_L: end row of each label at home.
    """
    counts_L = offsets_L.diff(prepend=offsets_L.new_zeros(1)).long()
    mine_C = _my_labels(cut, ep.rank, counts_L.device)
    with ep.after(mark(counts_L)):
        counts_IC = ep.communicator.all_gather(counts_L).wait()[:, mine_C]
        done = mark(counts_L)
    counts_JIC = counts_IC[None]
    if etp.size > 1:
        with etp.after(done):
            counts_JIC = etp.communicator.all_gather(counts_IC).wait()
            done = mark(counts_L)
    with etp.after(done):
        # To pinned memory, so that the host goes on.
        on_host = [x.to("cpu", non_blocking=True) for x in (counts_L, counts_JIC)]
        done = mark(counts_L)
    kept = [counts_L, counts_IC]

    def wait() -> Plan:
        if done is not None:
            done.synchronize()
        sent, arriving = (x.tolist() for x in on_host)
        kept.clear()
        return _make_plan(cut, sent, arriving, counts_JIC, etp.rank)

    return PendingPlan(wait)


@cache
def _label_of(cut: Cut, device: torch.device) -> Tensor:
    """The label of each expert and part of the tokens, ``[E + 1, P]``; the last row is where an index of -1 leads."""
    labels_EP = torch.full((cut.num_experts + 1, cut.token_parts), -1)
    experts_L, parts_L = torch.tensor(cut.order).unbind(1)
    labels_EP[experts_L, parts_L] = torch.arange(len(cut.order))
    return labels_EP.to(device)


@cache
def _my_labels(cut: Cut, rank: int, device: torch.device) -> Tensor:
    """The labels of a rank's columns."""
    mine = [label for label, (expert, _) in enumerate(cut.order) if expert // cut.local_experts == rank]
    return torch.tensor(mine, device=device)


def _make_plan(cut: Cut, sent: list[int], arriving: list[list[list[int]]], counts_JIC: Tensor, j: int) -> Plan:
    """The groups, from the rows of each label this rank sends and those that each rank sends to each of its columns."""
    groups: list[Group] = []
    home = here = label = 0
    for columns in cut.columns:
        c, experts = columns.stop - columns.start, cut.experts(columns)
        sends = [sum(sent[label + i * c : label + (i + 1) * c]) for i in range(cut.ep)]
        received = [[sum(counts[columns]) for counts in ranks] for ranks in arriving]
        sizes = [sum(ranks) for ranks in received]
        groups.append(
            Group(
                home=slice(home, home + sum(sends)),
                sends=sends,
                receives=received[j],
                padded=max(sizes),
                here=slice(here, here + sum(sizes)),
                columns=columns,
                experts=experts,
                arrives_arranged=len(arriving) == 1 and experts.stop - experts.start == 1,
            )
        )
        home, here, label = home + sum(sends), here + sum(sizes), label + cut.ep * c
    return Plan(groups, counts_JIC, cut.token_parts, here)
