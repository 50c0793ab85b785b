"""Dispatchers to other ranks: of routed tokens (ep, with or without etp), and of tokens (etp alone).

Each is a :class:`minimax_train.kernels.experts.mlp.Dispatcher`. Its ``dispatch`` returns an
:class:`minimax_train.parallel.experts.overlap.OverlappedRoundTrip`, which calls, for every group and in this order,

    dispatch_group   starts to send tokens, or their weights, to the ranks that hold their experts
    permute          tokens as they arrived -> routed tokens by expert
    unpermute        results by expert -> as the tokens arrived
    combine_group    starts to send results to the ranks that own the tokens, which find them where the tokens were

Shape legend: T tokens of this rank, K assignments per token, J etp ranks, I ep ranks, B bucket ids, E experts, D
hidden, F expert hidden, N tokens of all groups, or one, as they arrive, R routed tokens by expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from minimax_train.kernels.experts import Dispatcher, Permutation
from minimax_train.parallel.experts.buckets import BucketGroup, ExpertBuckets, locate, make_groups
from minimax_train.parallel.experts.overlap import (
    CommunicationStream,
    OverlappedRoundTrip,
    Transfer,
    computed,
    split_groups,
)


class RoutedTokenDispatcher(Dispatcher):
    """A token travels once for each of its assignments, to the ranks that hold the expert, with the weight, and back.

        dispatch_group   all-to-all over ep, to the rank with the expert; all-gather over etp, to the expert's slices
        combine_group    reduce-scatter over etp, which sums the slices' parts; all-to-all over ep

    How many tokens go where is exchanged first; the host waits for it once, when it asks for the groups. With one group
    and without etp, tokens for this rank's own experts come before it, as a group of their own: their GEMMs run while
    the others arrive.
    """

    routed = slice(None)

    def __init__(
        self, experts_TK: Tensor, buckets: ExpertBuckets, ep: CommunicationStream, etp: CommunicationStream, ops: Any
    ) -> None:
        self.buckets, self.ep, self.etp = buckets, ep, etp
        self.permutation = Permutation.by_expert(buckets.assign(experts_TK), buckets.count, ops)
        ends_B = self.permutation.offsets_E
        # By id before they are gathered: each rank sorts in an order of its own.
        counts_B = buckets.by_id(ends_B.diff(prepend=ends_B.new_zeros(1)))
        (counts,) = etp.all_gather(*ep.all_gather(*computed(counts_B[None])))
        self._on_host = etp.to_host(counts)

    @cached_property
    def groups(self) -> list[BucketGroup]:
        counts = self._on_host.synchronize().view(self.etp.size, self.ep.size, -1).tolist()
        self._on_host.release()
        return make_groups(self.buckets, counts, self.ep.rank, self.etp.rank)

    @property
    def num_dispatched(self) -> int:
        return self.groups[-1].routed.stop

    @property
    def parts(self) -> Sequence[RoutedTokenDispatcher | BucketGroup]:
        """Without tokens that stay, those of all groups together lie by expert: they are one part."""
        return (self,) if self.buckets.own is None else self.groups

    def permute_dispatched(self, dispatched_RD: Tensor) -> Tensor:
        return dispatched_RD

    @cached_property
    def offsets_E(self) -> Tensor | None:
        """As :func:`locate` returns it, which is called once."""
        return locate(self.buckets, self.groups, self.permutation.offsets_E.device)

    def plan(self) -> list[Transfer]:
        """Tell the device in which order tokens arrive, while the first groups travel; for the forward pass only."""
        _ = self.offsets_E
        return []

    def dispatch(self, x_TD: Tensor, *weights_TK: Tensor, residual: float) -> OverlappedRoundTrip:
        x_RD = self.permutation.permute(x_TD)  # beside the exchange of counts
        weights_R1 = (self.permutation.permute_weights(w)[:, None] for w in weights_TK)
        return OverlappedRoundTrip(self, x_TD, residual, x_RD, *weights_R1)

    def received(
        self, x_TD: Tensor, residual: float, y_RD: Tensor, d_weights_R1: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        return self.permutation.unpermute(y_RD, None if d_weights_R1 is None else d_weights_R1[:, 0], x_TD, residual)

    def dispatch_group(self, group: BucketGroup, sent: list[Transfer], dispatched_ND: Tensor) -> list[Transfer]:
        sources = [x[group.source] for x in sent]
        if group.stays:  # this is done while the host starts the others' transfer
            dispatched_ND[group.routed].copy_(sources[0].tensor)
            return sources
        into = [dispatched_ND[group.routed] if group.by_expert else None, None][: len(sent)]
        return self.etp.all_gather(
            *self.ep.all_to_all(sources, group.input_splits, group.output_splits, into, group.padded)
        )

    def permute(self, group: BucketGroup, arrived_ND: Tensor, dispatched_ND: Tensor) -> Tensor:
        routed_RD = dispatched_ND[group.routed]
        return routed_RD if group.by_expert else torch.index_select(arrived_ND, 0, group.source_R, out=routed_RD)

    def permute_weights(self, group: BucketGroup, weights_N1: Tensor) -> Tensor:
        return weights_N1[:, 0].clone() if group.by_expert else weights_N1[:, 0].index_select(0, group.source_R)

    def unpermute(self, group: BucketGroup, y_RD: Tensor, d_weights_R: Tensor | None) -> list[Tensor]:
        results = [y_RD] if d_weights_R is None else [y_RD, d_weights_R[:, None]]
        if group.by_expert:
            return results
        if not len(y_RD):
            return [x.new_empty(len(group.place_N), x.shape[1]) for x in results]
        return [x.index_select(0, group.place_N) for x in results]  # what is in the padding does not matter

    def combine_group(self, group: BucketGroup, results: list[Transfer], combined: list[Tensor]) -> list[Transfer]:
        into = [out[group.source] for out in combined]
        if group.stays:
            for x, out in zip(results, into, strict=True):
                out.copy_(x.tensor)
            return []
        summed = self.etp.reduce_scatter(*results)
        return self.ep.all_to_all(summed, group.output_splits, group.input_splits, into)


@dataclass
class TokenGroup:
    """One group: the same range of every rank's tokens.

    Attributes:
        tokens: that range.
        dispatched: place of these tokens of all ranks among the dispatched ones, by group, rank and token.
        routed: place of their routed tokens among those of all groups.
        permutation: of their assignments.
    """

    tokens: slice
    dispatched: slice
    routed: slice
    permutation: Permutation = field(init=False)
    experts = slice(None)

    @property
    def offsets_E(self) -> Tensor:
        return self.permutation.offsets_E

    def permute_dispatched(self, dispatched_ND: Tensor) -> Tensor:
        return self.permutation.permute(dispatched_ND[self.dispatched])


class TokenDispatcher(Dispatcher):
    """Every rank holds a slice of every expert: a token goes to all ranks, whatever its assignments, once, and back.

        dispatch_group   all-gather over etp
        combine_group    reduce-scatter over etp, which sums the slices' parts

    All assignments are gathered first. Every rank has as many tokens as any other, so the host never waits.
    """

    def __init__(
        self, experts_TK: Tensor, num_experts: int, num_groups: int, etp: CommunicationStream, ops: Any
    ) -> None:
        (T, K), J = experts_TK.shape, etp.size
        self.etp, self.num_experts, self.ops, self.num_dispatched = etp, num_experts, ops, J * T
        self.groups = [
            TokenGroup(t, slice(J * t.start, J * t.stop), slice(J * K * t.start, J * K * t.stop))
            for t in split_groups(T, num_groups)
            if t.start < t.stop
        ]
        self._gathered = etp.all_gather(*computed(experts_TK))

    def plan(self) -> list[Transfer]:
        """Sort each group's assignments, while the first groups travel; for the forward pass only.

        Returns:
            The transfers that the round trip must keep until its end.
        """
        gathered, self._gathered = self._gathered, []
        for experts in gathered:  # none in backward
            experts_JTK = experts.wait().unflatten(0, (self.etp.size, -1))
            for group in self.groups:
                experts_NK = experts_JTK[:, group.tokens].flatten(0, 1)
                group.permutation = Permutation.by_expert(experts_NK, self.num_experts, self.ops)
        return gathered

    @property
    def parts(self) -> list[TokenGroup]:
        return self.groups

    def dispatch(self, x_TD: Tensor, *weights_TK: Tensor, residual: float) -> OverlappedRoundTrip:
        return OverlappedRoundTrip(self, x_TD, residual, x_TD, *weights_TK)

    def received(self, x_TD: Tensor, residual: float, y_TD: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        return y_TD.add_(x_TD, alpha=residual) if residual else y_TD, *others

    def dispatch_group(self, group: TokenGroup, sent: list[Transfer], dispatched_ND: Tensor) -> list[Transfer]:
        return self.etp.all_gather(*(x[group.tokens] for x in sent), into=dispatched_ND[group.dispatched])

    def permute(self, group: TokenGroup, arrived_ND: Tensor, dispatched_ND: Tensor) -> Tensor:
        return group.permutation.permute(arrived_ND)

    def permute_weights(self, group: TokenGroup, weights_NK: Tensor) -> Tensor:
        return group.permutation.permute_weights(weights_NK)

    def unpermute(self, group: TokenGroup, y_RD: Tensor, d_weights_R: Tensor | None) -> tuple[Tensor, ...]:
        return group.permutation.unpermute(y_RD, d_weights_R)

    def combine_group(self, group: TokenGroup, results: list[Transfer], combined: list[Tensor]) -> list[Transfer]:
        return self.etp.reduce_scatter(*results, into=[out[group.tokens] for out in combined])
