"""Which routed token goes where: expert buckets, groups of them, and the order in which they arrive.

Shape legend: T tokens, K assignments per token, B bucket ids, E experts, P parts of the tokens, J etp ranks, I ep
ranks, c buckets of a group on one rank, e experts of this rank, N tokens of a group as they arrive, R by expert.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from minimax_train.parallel.experts.overlap import split_groups


class ExpertBuckets:
    """How routed tokens are cut in groups, the same on all ranks.

    An *expert bucket* is one expert and one part of each rank's tokens. The buckets of a rank's experts are ordered by
    expert, then part; a group is a range of them, the same of every rank. A bucket's *id* is its place in the order by
    group, rank, bucket. Routed tokens lie by id at their source, and by bucket where they are dispatched to: so a group
    is contiguous in both.
    """

    def __init__(self, num_experts: int, ep: int, groups: int) -> None:
        self.num_experts, self.ep, self.groups, self.local_experts = num_experts, ep, groups, num_experts // ep
        # Only as many parts of the tokens as it takes for a bucket to be no more than the smallest group.
        self.token_parts = -(-max(1, 2 * (groups - 1)) // self.local_experts)
        self.count = num_experts * self.token_parts
        # The buckets of a rank that each group has, at least one.
        self.ranges = split_groups(self.count // ep, groups)
        self._ids_EP: dict[torch.device, Tensor] = {}

    def ids(self, group: int, rank: int) -> slice:
        """Of the buckets that a group has of a rank."""
        buckets = self.ranges[group]
        c = buckets.stop - buckets.start
        start = self.ep * buckets.start + rank * c
        return slice(start, start + c)

    def experts(self, group: int) -> slice:
        """A rank's experts that a group has buckets of."""
        buckets = self.ranges[group]
        return slice(buckets.start // self.token_parts, -(-buckets.stop // self.token_parts))

    def assign(self, experts_TK: Tensor) -> Tensor:
        """The bucket id of each assignment, -1 for none."""
        T, device = len(experts_TK), experts_TK.device
        if device not in self._ids_EP:
            # The last row is where -1 leads.
            ids_EP = torch.full((self.num_experts + 1, self.token_parts), -1)
            for group, of_rank in enumerate(self.ranges):
                for rank in range(self.ep):
                    ids = self.ids(group, rank)
                    ids_EP[:-1].view(self.ep, -1)[rank, of_rank] = torch.arange(ids.start, ids.stop)
            self._ids_EP[device] = ids_EP.to(device)
        part_T = torch.arange(T, device=device) * self.token_parts // max(T, 1)
        return self._ids_EP[device][experts_TK, part_T[:, None]]


@dataclass
class BucketGroup:
    """One group's routed tokens, on this rank.

    Attributes:
        source: which they are before they are sent, and after they have come back.
        input_splits, output_splits: how many go to, and come from, each ep rank.
        padded: how many each etp rank passes on: the most that any of them receives.
        routed: which they are where they are dispatched to, by expert.
        experts: of this rank, which they are for.
        ids: of this rank's buckets.
        by_expert: whether they arrive by expert and without gaps.
        offsets_E: end of each of these experts' tokens among them, int32.
        source_R, place_N: which arrived token each routed token is, and the reverse, 0 for padding.
    """

    source: slice
    input_splits: list[int]
    output_splits: list[int]
    padded: int
    routed: slice
    experts: slice
    ids: slice
    by_expert: bool
    offsets_E: Tensor = field(init=False)
    source_R: Tensor = field(init=False)
    place_N: Tensor = field(init=False)


def make_groups(buckets: ExpertBuckets, counts: list[list[list[int]]], i: int, j: int) -> list[BucketGroup]:
    """The groups of rank (i of ep, j of etp).

    Args:
        counts: ``[J, I, B]``, how many tokens each rank has for each bucket id.
    """
    groups: list[BucketGroup] = []
    source = routed = 0
    for index in range(buckets.groups):
        ids, experts = buckets.ids(index, i), buckets.experts(index)
        input_splits = [sum(counts[j][i][buckets.ids(index, rank)]) for rank in range(buckets.ep)]
        received = [[sum(counts_B[ids]) for counts_B in ranks] for ranks in counts]
        sizes = [sum(splits) for splits in received]
        groups.append(
            BucketGroup(
                source=slice(source, source := source + sum(input_splits)),
                input_splits=input_splits,
                output_splits=received[j],
                padded=max(sizes),
                routed=slice(routed, routed := routed + sum(sizes)),
                experts=experts,
                ids=ids,
                by_expert=len(counts) == 1 and experts.stop - experts.start == 1,
            )
        )
    return groups


def locate(buckets: ExpertBuckets, groups: list[BucketGroup], counts_JIB: Tensor) -> Tensor:
    """Fills in what of the groups is on the device; the end of each expert's routed tokens of all groups, int32."""
    counts_C = torch.cat([counts_JIB[:, :, group.ids] for group in groups], -1).sum((0, 1))
    offsets_e = counts_C.view(-1, buckets.token_parts).sum(1).cumsum(0).int()
    for group in groups:
        # Of the first and the last expert it may have a part.
        group.offsets_E = offsets_e[group.experts].clamp(max=group.routed.stop) - group.routed.start
        if not group.by_expert:
            _locate_arrivals(group, counts_JIB[:, :, group.ids])
    return offsets_e


def _locate_arrivals(group: BucketGroup, counts_JIc: Tensor) -> None:
    J, device, size = len(counts_JIc), counts_JIc.device, group.routed.stop - group.routed.start
    # A bucket's tokens from one rank stay together: they arrive by (j, i, c), and are wanted by (c, j, i).
    arrival_JX = counts_JIc.flatten(1)
    starts_JX = arrival_JX.cumsum(1) - arrival_JX + group.padded * torch.arange(J, device=device)[:, None]
    starts_X = starts_JX.view_as(counts_JIc).permute(2, 0, 1).flatten()
    counts_X = counts_JIc.permute(2, 0, 1).flatten()
    moved_X = starts_X - (counts_X.cumsum(0) - counts_X)
    routed_R = torch.arange(size, device=device)
    group.source_R = routed_R + moved_X.repeat_interleave(counts_X, output_size=size)
    group.place_N = routed_R.new_zeros(J * group.padded).scatter_(0, group.source_R, routed_R)
