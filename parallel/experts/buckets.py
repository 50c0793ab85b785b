"""Which routed token goes where with ``ep``: expert buckets, groups of them, and the order in which tokens arrive.

Two experts on each of two ranks, one part of the tokens, two groups: bucket b of a rank is its b-th expert, and

    bucket id        0            1            2            3
    group, rank      0, 0         0, 1         1, 0         1, 1
    expert           0            2            1            3

A rank sorts its routed tokens by bucket id, but those that stay on it last where they are a group of their own. What it
sends to each rank in group 0's all-to-all is then contiguous, and so is the whole group. The rank that holds the
experts sorts what it receives by its own buckets: by expert.

Shape legend: T tokens, K assignments per token, B bucket ids, E experts, P parts of the tokens, J etp ranks, I ep
ranks, c buckets of a group on one rank, e experts of this rank, N tokens of a group as they arrive, R by expert.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain

import torch
from torch import Tensor

from minimax_train.parallel.experts.overlap import split_groups


class ExpertBuckets:
    """How routed tokens are divided into groups, the same on all ranks, and in which order a rank sorts its own.

    Every rank's tokens are divided into ``token_parts`` equal parts, usually one. An *expert bucket* is the routed
    tokens of one expert and one part. The buckets of a rank's experts are ordered by expert, then part; a group is a
    range of this order, the same for every rank. Bucket *ids* number the buckets of all ranks by group, rank, bucket.

    Args:
        own: this rank, if the tokens that stay on it are to be a group of their own, the first; of the others there is
            one group then. The rank sorts its own experts' tokens last, so that those that travel are contiguous.
    """

    def __init__(self, num_experts: int, ep: int, groups: int, own: int | None = None) -> None:
        assert own is None or groups == 1
        self.num_experts, self.ep, self.groups, self.own = num_experts, ep, groups, own
        self.local_experts = num_experts // ep
        # Only as many parts of the tokens as it takes for a bucket to be no more than the smallest group.
        self.token_parts = -(-max(1, 2 * (groups - 1)) // self.local_experts)
        self.count = num_experts * self.token_parts
        # The buckets of a rank that each group has, at least one.
        self.ranges = split_groups(self.count // ep, groups)
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}

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
        """The bucket of each assignment, int64 ``[T, K]``, by its place in the order in which this rank sorts; -1 where
        it has no expert."""
        places_EP, _ = self._tables(experts_TK.device)
        part_T = torch.arange(len(experts_TK), device=experts_TK.device) * self.token_parts // max(len(experts_TK), 1)
        return places_EP[experts_TK, part_T[:, None]]

    def by_id(self, counts_B: Tensor) -> Tensor:
        """Tokens per bucket in the order in which this rank sorts -> by id."""
        return counts_B if self.own is None else counts_B.index_select(0, self._tables(counts_B.device)[1])

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The place of each expert's and part's bucket in this rank's order, and of each id."""
        if device not in self._on:
            order = [*range(self.count)]
            if self.own is not None:
                mine = self.ids(0, self.own)
                order = order[: mine.start] + order[mine.stop :] + order[mine]
            place_B = torch.empty(self.count, dtype=torch.int64)
            place_B[order] = torch.arange(self.count)
            # The last row is for assignments without expert: index -1 reads it.
            places_EP = torch.full((self.num_experts + 1, self.token_parts), -1)
            for group, of_rank in enumerate(self.ranges):
                for rank in range(self.ep):
                    places_EP[:-1].view(self.ep, -1)[rank, of_rank] = place_B[self.ids(group, rank)]
            self._on[device] = places_EP.to(device), place_B.to(device)
        return self._on[device]


ALIGNED = 4
"""Of so many int32 the addresses are multiples of 16 bytes, for which Triton compiles kernels of their own."""

Counts = list[list[list[int]]]
"""``[J][I][B]``, how many tokens each rank has for each bucket."""


@dataclass
class BucketGroup:
    """One group: the routed tokens that this rank sends in it, and those that it receives for its experts.

    Attributes:
        source: place of what it sends among its routed tokens in the order in which it sorts; results come back there.
        input_splits, output_splits: how many it sends to, and receives from, each ep rank.
        padded: the most that any of its etp ranks receives; each passes on as many to the others.
        routed: place of what it receives among the routed tokens of all groups.
        experts: which of its experts these are for.
        of_rank: which of the buckets of its rank's experts these are.
        counts: ``[J][I][c]``, how many tokens it receives of each rank for each of these buckets.
        by_expert: whether tokens arrive sorted by expert and without padding, so that nothing need be moved.
        stays: whether these are the tokens that stay on this rank: nothing is sent.
        offsets_E: end of each of these experts' tokens within the group, int32.
        runs_X: unless ``by_expert``, the X runs of tokens that move as they are, in the order in which experts want
            them: how far each arrived from where it belongs, and how many tokens it has, int32.
    """

    source: slice
    input_splits: list[int]
    output_splits: list[int]
    padded: int
    routed: slice
    experts: slice
    of_rank: slice
    counts: Counts
    by_expert: bool
    stays: bool = False
    offsets_E: Tensor = field(init=False)
    runs_X: tuple[Tensor, Tensor] = field(init=False)

    # Launched when they are first asked for: after the GEMMs of tokens that stay.
    @cached_property
    def source_R(self) -> Tensor:
        """Where each routed token lies among the arrived ones, int64."""
        (moved_X, counts_X), size = self.runs_X, self.routed.stop - self.routed.start
        return torch.arange(size, device=moved_X.device) + moved_X.repeat_interleave(counts_X, output_size=size)

    @cached_property
    def place_N(self) -> Tensor:
        """The inverse, 0 for padding, int64."""
        routed_R = torch.arange(len(self.source_R), device=self.source_R.device)
        return routed_R.new_zeros(len(self.counts) * self.padded).scatter_(0, self.source_R, routed_R)

    def permute_dispatched(self, dispatched_RD: Tensor) -> Tensor:
        return dispatched_RD[self.routed]


def make_groups(buckets: ExpertBuckets, counts: Counts, i: int, j: int) -> list[BucketGroup]:
    """The groups of rank (i of ep, j of etp), given all ranks' tokens per bucket id."""
    groups: list[BucketGroup] = []
    source = routed = 0
    for index, of_rank in enumerate(buckets.ranges):
        ids, experts = buckets.ids(index, i), buckets.experts(index)
        input_splits = [sum(counts[j][i][buckets.ids(index, rank)]) for rank in range(buckets.ep)]
        received = [[of[ids] for of in ranks] for ranks in counts]
        if buckets.own is not None:
            own, input_splits[i] = received[0][i], 0
            received[0][i], routed = [0] * len(own), sum(own)
            groups.append(
                BucketGroup(
                    source=slice(sum(input_splits), sum(input_splits) + routed),
                    input_splits=[],
                    output_splits=[],
                    padded=routed,
                    routed=slice(routed),
                    experts=experts,
                    of_rank=of_rank,
                    counts=[[own]],
                    by_expert=True,
                    stays=True,
                )
            )
        sizes = [sum(map(sum, ranks)) for ranks in received]
        groups.append(
            BucketGroup(
                source=slice(source, source := source + sum(input_splits)),
                input_splits=input_splits,
                output_splits=[*map(sum, received[j])],
                padded=max(sizes),
                routed=slice(routed, routed := routed + sum(sizes)),
                experts=experts,
                of_rank=of_rank,
                counts=received,
                by_expert=len(counts) == 1
                and (experts.stop - experts.start == 1 or (buckets.own is not None and buckets.ep == 2)),
            )
        )
    return groups


def locate(buckets: ExpertBuckets, groups: list[BucketGroup], device: torch.device) -> Tensor | None:
    """Fill in the groups' tensors: some numbers, which go from the host to the device as one copy.

    Returns:
        The end of each of this rank's experts' routed tokens, of all groups together, int32; None where tokens that
        stay are a group of their own, so that all together do not lie by expert.
    """
    per_bucket = [[sum(x) for x in zip(*chain(*group.counts), strict=True)] for group in groups]
    tables = [_ends(buckets, group.of_rank, of) for group, of in zip(groups, per_bucket, strict=True)]
    if buckets.own is None:
        tables.append(_ends(buckets, slice(None), [*chain(*per_bucket)]))
    moved = [group for group in groups if not group.by_expert]
    for group in moved:
        tables += _runs(group)
    padded = [[*table, *[0] * (-len(table) % ALIGNED)] for table in tables]
    numbers = torch.tensor([*chain(*padded)], dtype=torch.int32, pin_memory=device.type == "cuda")
    parts = zip(numbers.to(device, non_blocking=True).split([*map(len, padded)]), tables, strict=True)
    tensors = (part[: len(table)] for part, table in parts)
    for group in groups:
        group.offsets_E = next(tensors)
    offsets_e = next(tensors) if buckets.own is None else None
    for group in moved:
        group.runs_X = next(tensors), next(tensors)
    return offsets_e


def _ends(buckets: ExpertBuckets, of_rank: slice, tokens: list[int]) -> list[int]:
    """The end of each expert's tokens, given those of consecutive buckets."""
    ends = {place // buckets.token_parts: end for place, end in enumerate(accumulate(tokens), of_rank.start or 0)}
    return [*ends.values()]  # of each expert's last bucket


def _runs(group: BucketGroup) -> tuple[list[int], list[int]]:
    """Of the X = J I c runs of tokens of one rank and bucket.

    Tokens arrive by etp rank, ep rank, bucket (j, i, c), each etp rank's padded; experts want them by (c, j, i).
    """
    starts = [
        [*accumulate(chain(*ranks), initial=group.padded * j)] for j, ranks in enumerate(group.counts)
    ]  # of [j][i * c]
    num_buckets, moved, counts, routed = len(group.counts[0][0]), list[int](), list[int](), 0
    for c in range(num_buckets):
        for j, ranks in enumerate(group.counts):
            for i, of in enumerate(ranks):
                moved.append(starts[j][i * num_buckets + c] - routed)
                counts.append(of[c])
                routed += of[c]
    return moved, counts
