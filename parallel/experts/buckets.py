"""Which routed token goes where with ``ep``: expert buckets, groups of them, and the order in which tokens arrive.

Two experts on each of two ranks, one part of the tokens, two groups: bucket b of a rank is its b-th expert, and

    bucket id        0            1            2            3
    group, rank      0, 0         0, 1         1, 0         1, 1
    expert           0            2            1            3

A rank sorts its routed tokens by bucket id. What it sends to each rank in group 0's all-to-all is then contiguous, and
so is the whole group. The rank that holds the experts sorts what it receives by its own buckets: by expert.

Shape legend: T tokens, K assignments per token, B bucket ids, E experts, P parts of the tokens, J etp ranks, I ep
ranks, c buckets of a group on one rank, e experts of this rank, N tokens of a group as they arrive, R by expert.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from minimax_train.parallel.experts.overlap import split_groups


class ExpertBuckets:
    """How routed tokens are divided into groups, the same on all ranks.

    Every rank's tokens are divided into ``token_parts`` equal parts, usually one. An *expert bucket* is the routed
    tokens of one expert and one part. The buckets of a rank's experts are ordered by expert, then part; a group is a
    range of this order, the same for every rank. Bucket *ids* number the buckets of all ranks by group, rank, bucket.
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
        """Ids of the buckets that a group has of a rank's experts."""
        buckets = self.ranges[group]
        c = buckets.stop - buckets.start
        start = self.ep * buckets.start + rank * c
        return slice(start, start + c)

    def experts(self, group: int) -> slice:
        """Which of a rank's experts a group has buckets of."""
        buckets = self.ranges[group]
        return slice(buckets.start // self.token_parts, -(-buckets.stop // self.token_parts))

    def assign(self, experts_TK: Tensor) -> Tensor:
        """The bucket id of each assignment, int64 ``[T, K]``; -1 where it has no expert."""
        T, device = len(experts_TK), experts_TK.device
        if device not in self._ids_EP:
            # The last row is for assignments without expert: index -1 reads it.
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
    """One group: the routed tokens that this rank sends in it, and those that it receives for its experts.

    Attributes:
        source: place of what it sends among its routed tokens in the order of bucket ids; results come back there.
        input_splits, output_splits: how many it sends to, and receives from, each ep rank.
        padded: the most that any of its etp ranks receives; each passes on as many to the others.
        routed: place of what it receives among the routed tokens of all groups, sorted by expert.
        experts: which of its experts these are for.
        ids: of the buckets of these experts.
        by_expert: whether tokens arrive sorted by expert and without padding, so that nothing need be moved.
        offsets_E: end of each of these experts' tokens within the group, int32.
        source_R, place_N: unless ``by_expert``, where each routed token lies among the arrived ones, and the inverse,
            0 for padding, int64.
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
    """Fill in the groups' tensors on the device, from tokens per bucket ``[J, I, B]`` of all ranks.

    Returns:
        The end of each of this rank's experts' routed tokens, of all groups together, int32.
    """
    counts_C = torch.cat([counts_JIB[:, :, group.ids] for group in groups], -1).sum((0, 1))
    offsets_e = counts_C.view(-1, buckets.token_parts).sum(1).cumsum(0).int()
    for group in groups:
        # Of its first and its last expert a group may have some of the parts only.
        group.offsets_E = offsets_e[group.experts].clamp(max=group.routed.stop) - group.routed.start
        if not group.by_expert:
            _locate_arrivals(group, counts_JIB[:, :, group.ids])
    return offsets_e


def _locate_arrivals(group: BucketGroup, counts_JIc: Tensor) -> None:
    J, device, size = len(counts_JIc), counts_JIc.device, group.routed.stop - group.routed.start
    # Tokens arrive by etp rank, ep rank, bucket (j, i, c), each etp rank's padded; experts want them by (c, j, i). The
    # X = J I c runs of tokens of one rank and bucket move as they are.
    arrival_JX = counts_JIc.flatten(1)
    starts_JX = arrival_JX.cumsum(1) - arrival_JX + group.padded * torch.arange(J, device=device)[:, None]
    starts_X = starts_JX.view_as(counts_JIc).permute(2, 0, 1).flatten()
    counts_X = counts_JIc.permute(2, 0, 1).flatten()
    moved_X = starts_X - (counts_X.cumsum(0) - counts_X)
    routed_R = torch.arange(size, device=device)
    group.source_R = routed_R + moved_X.repeat_interleave(counts_X, output_size=size)
    group.place_N = routed_R.new_zeros(J * group.padded).scatter_(0, group.source_R, routed_R)
