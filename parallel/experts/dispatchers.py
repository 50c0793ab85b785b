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

from collections.abc import Callable, Sequence
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

    def __init__(
        self, experts_TK: Tensor, buckets: ExpertBuckets, ep: CommunicationStream, etp: CommunicationStream, ops: Any
    ) -> None:
        self.buckets, self.ep, self.etp = buckets, ep, etp
        self.permutation = Permutation.by_expert(buckets.assign(experts_TK), buckets.count, ops)  # by bucket id
        ends_B = self.permutation.offsets_E
        counts_B = buckets.by_id(ends_B.diff(prepend=ends_B.new_zeros(1)))
        (counts,) = etp.all_gather(*ep.all_gather(*computed(counts_B[None])))
        self._on_host = etp.to_host(counts)
        self._is_located = False

    @cached_property
    def groups(self) -> list[BucketGroup]:
        counts = self._on_host.synchronize().view(self.etp.size, self.ep.size, -1).tolist()
        self._on_host.release()
        return make_groups(self.buckets, counts, self.ep.rank, self.etp.rank)

    @property
    def num_dispatched(self) -> int:
        return self.groups[-1].routed.stop

    @property
    def parts(self) -> Sequence[Any]:
        return (self,) if self.buckets.own is None else self.groups

    def plan(self) -> None:
        """Tell the device in which order tokens arrive, while the first groups travel; for the forward pass only."""
        if not self._is_located:
            self.offsets_E = locate(self.buckets, self.groups, self.permutation.offsets_E.device)
            self._is_located = True

    def dispatch(self, x_TD: Tensor, *weights_TK: Tensor) -> OverlappedRoundTrip:
        x_RD = self.permutation.permute(x_TD)  # beside the exchange of counts
        return OverlappedRoundTrip(self, x_RD, *(self.permutation.permute_weights(w)[:, None] for w in weights_TK))

    def dispatched(self, sent_RD: Tensor, dispatched_ND: Tensor) -> tuple[Tensor, ...]:
        return (dispatched_ND,)

    def received(self, y_RD: Tensor, d_weights_R1: Tensor | None = None) -> tuple[Tensor, ...]:
        return self.permutation.unpermute(y_RD, None if d_weights_R1 is None else d_weights_R1[:, 0])

    def dispatch_group(self, group: BucketGroup, sent: list[Transfer], dispatched_ND: Tensor) -> list[Transfer]:
        sources = [x[group.source] for x in sent]
        if group.stays:
            return sources
        into = [dispatched_ND[group.routed] if group.by_expert else None, None][: len(sent)]
        return self.etp.all_gather(
            *self.ep.all_to_all(sources, group.input_splits, group.output_splits, into, group.padded)
        )

    def permute(self, group: BucketGroup, arrived_ND: Tensor, dispatched_ND: Tensor) -> Tensor:
        routed_RD = dispatched_ND[group.routed]
        if group.stays:
            return routed_RD.copy_(arrived_ND)
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


class TokenGroup:
    """Some tokens that go through the experts together: this rank's own, or a range of every other rank's.

    Attributes:
        tokens: the range, of every rank's tokens.
        dispatched: place of this range of all ranks' tokens among the gathered ones, by group, rank and token; None for
            own tokens, which nobody gathers.
        routed: place of these tokens' routed tokens among those of all groups.
        permutation: of their assignments; what sorts them is launched when it is first asked for.
    """

    experts = slice(None)

    def __init__(
        self, tokens: slice, dispatched: slice | None, routed: slice, sort: Callable[[TokenGroup], Permutation]
    ) -> None:
        self.tokens, self.dispatched, self.routed, self._sort = tokens, dispatched, routed, [sort]

    @cached_property
    def permutation(self) -> Permutation:
        return self._sort.pop()(self)  # it refers to the dispatcher, which refers to this group

    @property
    def offsets_E(self) -> Tensor:
        return self.permutation.offsets_E

    def permute_dispatched(self, own_TD: Tensor, gathered_ND: Tensor) -> Tensor:
        return self.permutation.permute(own_TD if self.dispatched is None else gathered_ND[self.dispatched])


class TokenDispatcher(Dispatcher):
    """Every rank holds a slice of every expert: a token goes to all ranks, whatever its assignments, once, and back.

        dispatch_group   all-gather over etp
        combine_group    reduce-scatter over etp, which sums the slices' parts

    All assignments are gathered first. Every rank has as many tokens as any other, so the host never waits. This rank's
    own tokens are the first group: their GEMMs run while the others' arrive, and their results are sent with those.
    """

    def __init__(
        self, experts_TK: Tensor, num_experts: int, num_groups: int, etp: CommunicationStream, ops: Any
    ) -> None:
        (T, K), J = experts_TK.shape, etp.size
        self.etp, self.num_experts, self.ops, self.num_dispatched = etp, num_experts, ops, J * T
        self._own = TokenGroup(slice(T), None, slice(T * K), lambda _: self._sort(experts_TK))
        self._of_own: tuple[Tensor, Tensor | None] | None = None
        self.groups = [self._own]
        for t in split_groups(T, num_groups):
            if t.start < t.stop:
                routed = slice(T * K + (J - 1) * K * t.start, T * K + (J - 1) * K * t.stop)
                self.groups.append(TokenGroup(t, slice(J * t.start, J * t.stop), routed, self._sort_others))
        (self._gathered,) = etp.all_gather(*computed(experts_TK))

    @property
    def parts(self) -> list[TokenGroup]:
        return self.groups

    def plan(self) -> None:
        """Nothing: each group's assignments are sorted when it is asked for them."""

    def _sort(self, experts_TK: Tensor, size: int | None = None) -> Permutation:
        return Permutation.by_expert(experts_TK, self.num_experts, self.ops, size)

    def _sort_others(self, group: TokenGroup) -> Permutation:
        """As if this rank's own tokens of the range had no experts."""
        experts_JtK = self._gathered.wait().unflatten(0, (self.etp.size, -1))[:, group.tokens].contiguous()
        experts_JtK[self.etp.rank] = -1
        if group is self.groups[-1]:
            self._gathered.release()
        return self._sort(experts_JtK.flatten(0, 1), group.routed.stop - group.routed.start)

    def dispatch(self, x_TD: Tensor, *weights_TK: Tensor) -> OverlappedRoundTrip:
        return OverlappedRoundTrip(self, x_TD, *weights_TK)

    def dispatched(self, own_TD: Tensor, gathered_ND: Tensor) -> tuple[Tensor, ...]:
        return own_TD, gathered_ND

    def received(self, *combined: Tensor) -> tuple[Tensor, ...]:
        return combined

    def dispatch_group(self, group: TokenGroup, sent: list[Transfer], gathered_ND: Tensor) -> list[Transfer]:
        parts = [x[group.tokens] for x in sent]
        return parts if group.dispatched is None else self.etp.all_gather(*parts, into=gathered_ND[group.dispatched])

    def permute(self, group: TokenGroup, arrived_ND: Tensor, gathered_ND: Tensor) -> Tensor:
        return group.permutation.permute(arrived_ND)

    def permute_weights(self, group: TokenGroup, weights_NK: Tensor) -> Tensor:
        return group.permutation.permute_weights(weights_NK)

    def unpermute(self, group: TokenGroup, y_RD: Tensor, d_weights_R: Tensor | None) -> tuple[Tensor, ...]:
        """Of own tokens nothing yet: each other group's results go out with theirs."""
        if group is self._own:
            self._of_own = y_RD, d_weights_R
            return ()
        assert self._of_own is not None
        results = group.permutation.unpermute(y_RD, d_weights_R)
        into = [x.unflatten(0, (self.etp.size, -1))[self.etp.rank] for x in results]
        own = self._own.permutation.unpermute(*self._of_own, group.tokens, into[0])
        for x, out in zip(own[1:], into[1:], strict=True):
            out.copy_(x)
        if group is self.groups[-1]:
            self._of_own = None
        return results

    def combine_group(self, group: TokenGroup, results: list[Transfer], combined: list[Tensor]) -> list[Transfer]:
        return self.etp.reduce_scatter(*results, into=[out[group.tokens] for out in combined])
