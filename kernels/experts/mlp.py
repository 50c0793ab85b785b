"""The SwiGLU experts as one autograd layer: grouped GEMMs between a dispatcher's dispatch and combine.

    forward     dispatch x and weights;    of each group:  permute, up, down, unpermute, combine
    backward    dispatch dy;               of each group:  permute, d_hidden, dx, unpermute, combine
                then, of all groups:                       d_down, d_gate_up; or later (``kernels/deferral.py``)

A *dispatcher* says where tokens go between the two. With all experts on one rank they stay (:class:`LocalDispatcher`,
one group); ``parallel/experts/dispatchers.py`` sends them to other ranks and back, in groups, of which one's transfers
run beside another's GEMMs. The gradients of the experts' weights come last, so that those of the tokens travel beside.

The gradients of the weights go to where an engine adds them up, if it has such a place (``kernels/accumulation.py``).

Kept from forward to backward: the dispatched tokens, gate and up of each routed token (2F), its weight, the dispatcher.

Shape legend: T tokens, K assignments per token, N dispatched tokens, R routed tokens sorted by expert, E experts, D
hidden, F expert hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimax_train.kernels.accumulation import Accumulator, add_gradient, find_accumulators
from minimax_train.kernels.deferral import defer, gradients_of
from minimax_train.kernels.dispatch import AUTO
from minimax_train.kernels.experts.gemms import SeparateGemms, choose_implementation
from minimax_train.kernels.experts.permutation import Permutation


class Dispatcher:
    """Where the tokens of one call of the layer go; made for this call, used in its forward and its backward.

    ``dispatch`` starts a *round trip* of tokens: to the experts, through them group by group, and back. Iterating over
    the trip yields the groups in order, each once its tokens are on this rank. A group has

        routed      slice: its place among the routed tokens of all groups
        experts     slice: the experts of this rank that it has tokens for
        offsets_E   int32: end of each of these experts' tokens within the group, as grouped GEMMs take it

    For each group the layer calls, before it asks for the next one,

        trip.permute(group)                      its routed tokens by expert, ``[R, D]``
        trip.permute_weights(group)              the weights of their assignments, ``[R]``; forward only
        trip.combine(group, y_RD, d_weights_R)   starts to send the experts' output back (forward), or the gradients of
                                                 tokens and weights (backward)

    After the last group, ``trip.dispatched_ND`` holds the dispatched tokens of all groups, and ``trip.wait()`` returns
    what was sent back: ``[T, D]``, to which ``residual`` times the tokens is added, and in backward ``[T, K]`` as well.

    The gradients of the experts' weights are sums over ``parts``, which together have all routed tokens. A part has

        routed, offsets_E                    as a group, for all experts of this rank
        permute_dispatched(dispatched_ND)    its routed tokens by expert, ``[R, D]``: operands of weight GEMMs
    """

    is_local = False
    """Whether no other rank takes part."""
    parts: Any

    def dispatch(self, x_TD: Tensor, *weights_TK: Tensor, residual: float) -> Any:
        """
        Args:
            weights_TK: one in forward, none in backward.
        """
        raise NotImplementedError


class LocalDispatcher(Dispatcher):
    """All experts are here, and the only group and part is the dispatcher itself."""

    is_local, routed, experts = True, slice(None), slice(None)

    def __init__(self, permutation: Permutation) -> None:
        self.permutation, self.offsets_E = permutation, permutation.offsets_E

    @property
    def parts(self) -> tuple[LocalDispatcher]:
        return (self,)

    def dispatch(self, x_TD: Tensor, *weights_TK: Tensor, residual: float) -> _LocalRoundTrip:
        return _LocalRoundTrip(self, residual, x_TD, *weights_TK)

    def permute_dispatched(self, dispatched_ND: Tensor) -> Tensor:
        return self.permutation.permute(dispatched_ND)


class _LocalRoundTrip:
    def __init__(self, group: LocalDispatcher, residual: float, x_TD: Tensor, *weights_TK: Tensor) -> None:
        self.group, self.residual, self.dispatched_ND, self.weights_TK = group, residual, x_TD, weights_TK

    def __iter__(self) -> Iterator[LocalDispatcher]:
        yield self.group

    def permute(self, group: LocalDispatcher) -> Tensor:
        return group.permutation.permute(self.dispatched_ND)

    def permute_weights(self, group: LocalDispatcher) -> Tensor:
        return group.permutation.permute_weights(*self.weights_TK)

    def combine(self, group: LocalDispatcher, y_RD: Tensor, d_weights_R: Tensor | None = None) -> None:
        self.combined = group.permutation.unpermute(y_RD, d_weights_R, self.dispatched_ND, self.residual)

    def wait(self) -> tuple[Tensor, ...]:
        return self.combined


def grouped_experts(
    x_TD: Tensor,
    weights_TK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    dispatcher: Dispatcher,
    gemms: SeparateGemms,
    residual: float = 0.0,
) -> Tensor:
    """The weighted sum of what its experts make of each token ``[T, D]``, plus ``residual`` times the token,
    differentiable in all four tensors."""
    deferral, *weights = defer(x_TD, gate_up_E2FD, down_EDF)
    accumulators = find_accumulators(weights)  # none where they are deferred
    return _GroupedExperts.apply(x_TD, weights_TK, dispatcher, gemms, residual, deferral, accumulators, *weights)


class _GroupedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weights_TK, dispatcher, gemms, residual, deferral, accumulators, gate_up_E2FD, down_EDF):
        gate_up_E2FD, down_EDF, kept = gate_up_E2FD.contiguous(), down_EDF.contiguous(), []
        trip = dispatcher.dispatch(x_TD, weights_TK, residual=residual)
        for group in trip:
            gate_up, down, offsets_E = gate_up_E2FD[group.experts], down_EDF[group.experts], group.offsets_E
            weights_R = trip.permute_weights(group)
            hidden_R2F, act_RF = gemms.up(trip.permute(group), gate_up, offsets_E, weights_R)
            kept += [hidden_R2F, weights_R]
            trip.combine(group, gemms.down(act_RF, down, offsets_E))
            del act_RF  # before the next group's
        ctx.save_for_backward(trip.dispatched_ND, gate_up_E2FD, down_EDF, *kept)
        ctx.dispatcher, ctx.gemms, ctx.residual = dispatcher, gemms, residual
        ctx.deferral, ctx.accumulators = deferral, accumulators
        return trip.wait()[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TD):
        x_ND, gate_up_E2FD, down_EDF, *kept = ctx.saved_tensors
        dispatcher, gemms, R, F = ctx.dispatcher, ctx.gemms, sum(map(len, kept[::2])), down_EDF.shape[2]
        trip = dispatcher.dispatch(dy_TD, residual=ctx.residual)
        # Groups write their parts of whole tensors, for the GEMMs that make the gradients of the experts' weights.
        whole = (x_ND.new_empty(R, 2 * F), x_ND.new_empty(R, F)) if len(kept) > 2 else None
        early = dispatcher.is_local and ctx.deferral is None  # no other rank waits for dx
        of_gate_up, of_down = ctx.accumulators or (None, None)
        d_down_EDF = None
        for group, hidden_R2F, weights_R in zip(trip, kept[::2], kept[1::2], strict=True):
            gate_up, down, offsets_E = gate_up_E2FD[group.experts], down_EDF[group.experts], group.offsets_E
            dy_RD, out = trip.permute(group), whole and tuple(x[group.routed] for x in whole)
            d_hidden_R2F, act_RF, d_weights_R = gemms.d_hidden(dy_RD, hidden_R2F, down, offsets_E, weights_R, out)
            if early:  # first free what dx does not need
                d_down_EDF = add_gradient(of_down, down_EDF.shape, partial(gemms.d_down, dy_RD, act_RF, offsets_E))
                act_RF = None
            del dy_RD
            trip.combine(group, gemms.dx(d_hidden_R2F, gate_up, offsets_E), d_weights_R)
        operands = [d_hidden_R2F] if early else [*(whole or (d_hidden_R2F, act_RF))]
        whole = out = d_hidden_R2F = act_RF = None
        dy_ND, parts, shapes = trip.dispatched_ND, dispatcher.parts, (gate_up_E2FD.shape, down_EDF.shape)

        def d_weight(accumulator: Accumulator | None, shape: torch.Size, gemm: Callable, dispatched_ND: Tensor) -> Any:
            rows = operands.pop()

            def make(out: Tensor | None, adds: bool) -> Tensor | None:
                for p in parts:
                    out = gemm(rows[p.routed], p.permute_dispatched(dispatched_ND), p.offsets_E, out, adds)
                    adds = True
                return out

            return add_gradient(accumulator, shape, make)

        def d_weights() -> tuple[Tensor | None, Tensor | None]:
            d_down = d_down_EDF
            if not early:
                d_down = d_weight(of_down, shapes[1], lambda act, dy, *how: gemms.d_down(dy, act, *how), dy_ND)
            return d_weight(of_gate_up, shapes[0], gemms.d_gate_up, x_ND), d_down

        gradients = gradients_of(ctx.deferral, d_weights)
        results = trip.wait()
        for accumulator in ctx.accumulators or ():
            accumulator.added()
        return *results, *[None] * 5, *gradients


def expert_mlp(
    x_TD: Tensor,
    weights_TK: Tensor,
    experts_TK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    *,
    residual: float = 0.0,
    implementation: str = AUTO,
) -> Tensor:
    """``y_t = residual x_t + sum_k weight_tk * down_e (silu(gate_e x_t) * up_e x_t)``, e = ``experts_tk``,
    differentiable. The residual is added in the pass that sums a token's experts, forward and backward.

    Args:
        x_TD: any floating dtype, the same as that of the experts' weights.
        weights_TK: may be of higher precision than x.
        experts_TK: int64; -1 adds nothing.
        gate_up_E2FD: gate over up, as in transformers' fused expert weights.
        implementation: as of :func:`minimax_train.kernels.experts.gemms.choose_implementation`.
    """
    gemms, ops = choose_implementation(x_TD, down_EDF.shape[2], implementation)
    dispatcher = LocalDispatcher(Permutation.by_expert(experts_TK, len(gate_up_E2FD), ops))
    return grouped_experts(x_TD, weights_TK, gate_up_E2FD, down_EDF, dispatcher, gemms, residual)
