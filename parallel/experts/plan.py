"""Which row goes where: groups, counts, and the order rows arrive in.

A *label* is a place in the order of rows at home: part of the tokens, part of each rank's experts, rank, expert. A
group is a part of the tokens and of the experts; its rows are contiguous at home, and in the buffer of arranged rows.

Shape legend: T tokens, K choices per token, L labels, J etp ranks, I ep ranks, C columns: parts of the tokens times
this rank's experts, c those of a group, R rows at home, N rows of a group as they arrive, m its arranged rows.
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

    @property
    def expert_parts(self) -> int:
        """As many as there may be: only then do the products of two groups share no weights."""
        return max(n for n in range(1, self.groups + 1) if self.groups % n == 0 and n <= self.local_experts)

    @property
    def token_parts(self) -> int:
        return self.groups // self.expert_parts

    @cached_property
    def expert_slices(self) -> list[slice]:
        """This rank's experts in each part: nothing runs beside the first transfer and the last, so those are small."""
        parts, experts = self.expert_parts, self.local_experts
        shares = [1, *[2] * (parts - 2), 1][:parts]
        ends = [0]
        for part, share in enumerate(accumulate(shares), 1):
            even = round(experts * share / sum(shares))
            ends.append(min(max(even, ends[-1] + 1), experts - (parts - part)))
        return [slice(*ends) for ends in pairwise(ends)]

    @cached_property
    def order(self) -> list[int]:
        """Experts in the order of their labels within a part of the tokens."""
        e = self.local_experts
        return [i * e + local for s in self.expert_slices for i in range(self.ep) for local in range(s.start, s.stop)]

    def labels(self, experts_TK: Tensor) -> tuple[Tensor, int]:
        """The label of each choice, -1 for none, and how many labels there are."""
        labels_TK = _label_of(self, experts_TK.device)[experts_TK]
        if self.token_parts > 1:
            T = len(experts_TK)
            part_T = torch.arange(T, device=experts_TK.device) * self.token_parts // max(T, 1)
            labels_TK = torch.where(labels_TK < 0, -1, labels_TK + part_T[:, None] * self.num_experts)
        return labels_TK, self.token_parts * self.num_experts


@dataclass(frozen=True)
class Group:
    """One group's rows, on this rank.

    Attributes:
        home: its rows before they are sent and after they have come back.
        sends, receives: rows to and from each ep rank.
        padded: rows that every etp rank gives: the most that any of them received.
        here: its arranged rows.
        experts: whose rows they are, of this rank's.
        columns: the same with the part of the tokens.
        arrives_arranged: whether rows arrive sorted by expert and without gaps.
    """

    home: slice
    sends: list[int]
    receives: list[int]
    padded: int
    here: slice
    experts: slice
    columns: slice
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
        rows_here: arranged rows of all groups, M.
        token_parts: one slice of arranged rows, and of columns, per part of the tokens.
    """

    groups: list[Group]
    counts_JIC: Tensor
    rows_here: int
    token_parts: list[tuple[slice, slice]]

    @cached_property
    def offsets_C(self) -> Tensor:
        """End of each column among the arranged rows, int32."""
        return self.counts_JIC.sum((0, 1)).cumsum(0).int()

    def offsets(self, rows: slice, columns: slice) -> Tensor:
        return self.offsets_C[columns] - rows.start

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
    counts_IC, done = counts_L[None, mine_C], mark(counts_L)
    if ep.size > 1:
        with ep.after(done):
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
    """The label of each expert within a part of the tokens; the last element is where an index of -1 leads."""
    labels = {expert: label for label, expert in enumerate(cut.order)}
    return torch.tensor([*(labels[expert] for expert in range(cut.num_experts)), -1], device=device)


@cache
def _my_labels(cut: Cut, rank: int, device: torch.device) -> Tensor:
    """The labels of this rank's experts, by part of the tokens and expert."""
    first, e = rank * cut.local_experts, cut.local_experts
    mine = [label for label, expert in enumerate(cut.order) if first <= expert < first + e]
    return torch.tensor(
        [part * cut.num_experts + label for part in range(cut.token_parts) for label in mine], device=device
    )


def _make_plan(cut: Cut, sent: list[int], arriving: list[list[list[int]]], counts_JIC: Tensor, j: int) -> Plan:
    """The groups, from the rows of each label this rank sends and those that each rank sends to each of its columns."""
    groups, token_parts = [], []
    home = here = label = 0
    for part in range(cut.token_parts):
        part_start = here
        for experts in cut.expert_slices:
            c = experts.stop - experts.start
            sends = [sum(sent[label + i * c : label + (i + 1) * c]) for i in range(cut.ep)]
            first = part * cut.local_experts
            columns = slice(first + experts.start, first + experts.stop)
            received = [[sum(counts[columns]) for counts in ranks] for ranks in arriving]
            sizes = [sum(ranks) for ranks in received]
            groups.append(
                Group(
                    home=slice(home, home + sum(sends)),
                    sends=sends,
                    receives=received[j],
                    padded=max(sizes),
                    here=slice(here, here + sum(sizes)),
                    experts=experts,
                    columns=columns,
                    arrives_arranged=len(arriving) == 1 and c == 1,
                )
            )
            home, here, label = home + sum(sends), here + sum(sizes), label + cut.ep * c
        columns = slice(part * cut.local_experts, (part + 1) * cut.local_experts)
        token_parts.append((slice(part_start, here), columns))
    return Plan(groups, counts_JIC, here, token_parts)
