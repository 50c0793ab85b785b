"""Experts that are only sliced: every rank holds its slice of every expert, ``ep`` is 1.

Whatever a token chooses, it needs all ranks. So tokens travel, each once, and not the rows of their choices:

    all-gather, etp        a group's tokens of every rank; their choices and weights before them, of all groups at once
    permute, products, sum over choices
    reduce-scatter, etp

Every rank has as many tokens as any other, so all sizes are known: no counts are exchanged, and the host never waits. A
group is a stretch of every rank's tokens. Backward is the same trip with gradients of the output; the products for the
weights' gradients come last, once for all groups, from rows that are brought in one order of experts for it.

Shape legend: T tokens of a rank, J ranks, t tokens of a group, n of all ranks, N = J * T, by group, rank and token; K
choices per token, D hidden, E experts, f a rank's share of their hidden size, r rows of a group by expert, R = N * K.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimax_train.kernels.experts import ExpertRows, permute, plan_rows
from minimax_train.kernels.experts.phases import (
    experts_backward_down,
    experts_backward_gate_up,
    tokens_backward,
    tokens_forward,
)
from minimax_train.parallel.experts.lanes import Arriving, Lane, Mark, mark, wait
from minimax_train.parallel.experts.pipeline import Pipeline, Returning


def sliced_experts(
    x_TD: Tensor,
    weights_TK: Tensor,
    experts_TK: Tensor,
    gate_up_E2fD: Tensor,
    down_EDf: Tensor,
    etp: Lane,
    groups: list[slice],
    implementation: str,
) -> Tensor:
    """``y_t = sum_k weight_tk * expert_tk(x_t)`` of this rank's tokens, in groups of them; empty ones are left out."""
    groups = [tokens for tokens in groups if tokens.start < tokens.stop]
    inputs = (x_TD, weights_TK, experts_TK, gate_up_E2fD, down_EDf)
    return _SlicedExperts.apply(*inputs, etp, groups, implementation)


def _gather(x_TD: Tensor, x_ND: Tensor, tokens: slice, start: Mark, etp: Lane) -> Arriving:
    """A group's tokens of all ranks, into their place."""
    here_JtD = _of_group(x_ND, tokens, etp).unflatten(0, (etp.size, -1))
    with etp.after(start):
        etp.communicator.all_gather(x_TD[tokens], out=here_JtD).wait()
        return Arriving(here_JtD.flatten(0, 1), mark(x_TD))


def _of_group(x_N: Tensor, tokens: slice, etp: Lane) -> Tensor:
    return x_N[etp.size * tokens.start : etp.size * tokens.stop]


def _by_group(x_JT: Tensor, groups: list[slice]) -> Tensor:
    """``[J, T, ...] -> [N, ...]``."""
    return torch.cat([x_JT[:, tokens].flatten(0, 1) for tokens in groups])


def _by_rank(x_N: Tensor, groups: list[slice], etp: Lane) -> Tensor:
    """``[N, ...] -> [J, T, ...]``."""
    return torch.cat([_of_group(x_N, tokens, etp).unflatten(0, (etp.size, -1)) for tokens in groups], 1)


class _SlicedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weights_TK, experts_TK, gate_up_E2fD, down_EDf, etp, groups, implementation):
        how = {"implementation": implementation}
        (T, D), y_TD = x_TD.shape, x_TD.new_empty(x_TD.shape)
        x_ND = x_TD.new_empty(etp.size * T, D)
        start = mark(x_TD)
        with etp.after(start):
            gathered = [etp.communicator.all_gather(x).wait() for x in (weights_TK, experts_TK)]
            chosen = mark(x_TD)
        plans: list[ExpertRows] = []
        hidden_r2f: list[Tensor] = []

        def bring(tokens: slice) -> Arriving:
            return _gather(x_TD, x_ND, tokens, start, etp)

        def work(index: int, tokens: slice, arriving: Arriving) -> tuple[Mark, tuple[Tensor, ...]]:
            weights_nK = _of_group(weights_NK, tokens, etp)
            y_nD, hidden = tokens_forward(arriving.rows_ND, weights_nK, plans[index], gate_up_E2fD, down_EDf, **how)
            hidden_r2f.append(hidden)
            return _sum_home(y_nD, y_TD, tokens, etp)

        pipeline = Pipeline(groups, bring)
        # Beside the first tokens' way here.
        wait(chosen)
        weights_NK, experts_NK = (_by_group(x_JTK, groups) for x_JTK in gathered)
        plans += [plan_rows(_of_group(experts_NK, tokens, etp), len(gate_up_E2fD), **how) for tokens in groups]
        returning = pipeline.run(work, Returning(y_TD, [(x_TD, *gathered)]))
        ctx.save_for_backward(x_ND, weights_NK, experts_NK, gate_up_E2fD, down_EDf, *hidden_r2f)
        ctx.plans, ctx.etp, ctx.groups, ctx.how = plans, etp, groups, how
        return returning.wait()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TD):
        x_ND, weights_NK, experts_NK, gate_up_E2fD, down_EDf, *hidden_r2f = ctx.saved_tensors
        plans, etp, groups, how = ctx.plans, ctx.etp, ctx.groups, ctx.how
        dy_TD, f = dy_TD.contiguous(), down_EDf.shape[2]
        dy_ND, dx_TD, d_weights_NK = torch.empty_like(x_ND), torch.empty_like(dy_TD), torch.empty_like(weights_NK)
        d_weights_TK = weights_NK.new_empty(len(dy_TD), weights_NK.shape[1])
        act_Rf, d_hidden_R2f = (x_ND.new_empty(experts_NK.numel(), width) for width in (f, 2 * f))
        start = mark(dy_TD)

        def bring(tokens: slice) -> Arriving:
            return _gather(dy_TD, dy_ND, tokens, start, etp)

        def work(index: int, tokens: slice, arriving: Arriving) -> tuple[Mark, tuple[Tensor, ...]]:
            outputs = (_of_group(x.unflatten(0, experts_NK.shape), tokens, etp) for x in (act_Rf, d_hidden_R2f))
            dx_nD, d_weights_nK = tokens_backward(
                arriving.rows_ND, hidden_r2f[index], _of_group(weights_NK, tokens, etp), plans[index],
                gate_up_E2fD, down_EDf, *(x.flatten(0, 1) for x in outputs), **how,
            )  # fmt: skip
            _of_group(d_weights_NK, tokens, etp).copy_(d_weights_nK)
            return _sum_home(dx_nD, dx_TD, tokens, etp)

        returning = Pipeline(groups, bring).run(work, Returning(dx_TD, [(dy_TD,)]))
        d_weights_JTK = _by_rank(d_weights_NK, groups, etp)
        with etp.after(mark(dy_TD)):
            etp.communicator.reduce_scatter(d_weights_JTK, out=d_weights_TK).wait()
            returning.add(mark(dy_TD), (d_weights_JTK,))
        plan = plans[0]
        if len(groups) > 1:  # from group by group to expert by expert
            plan = plan_rows(experts_NK, len(gate_up_E2fD), **how)
            source_R = _rows_of_groups(plans)[plan.choice_R]
            act_Rf, d_hidden_R2f = act_Rf.index_select(0, source_R), d_hidden_R2f.index_select(0, source_R)
        d_gate_up_E2fD = experts_backward_gate_up(permute(x_ND, plan, **how), d_hidden_R2f, plan.offsets_E, **how)
        d_down_EDf = experts_backward_down(permute(dy_ND, plan, **how), act_Rf, plan.offsets_E, **how)
        return returning.wait(), d_weights_TK, None, d_gate_up_E2fD, d_down_EDf, None, None, None


def _sum_home(y_nD: Tensor, y_TD: Tensor, tokens: slice, etp: Lane) -> tuple[Mark, tuple[Tensor, ...]]:
    """Start summing the slices' parts, each rank's tokens into their place at home."""
    with etp.after(mark(y_nD)):
        etp.communicator.reduce_scatter(y_nD.unflatten(0, (etp.size, -1)), out=y_TD[tokens]).wait()
        return mark(y_nD), (y_nD,)


def _rows_of_groups(plans: list[ExpertRows]) -> Tensor:
    """The row of each choice of all groups ``[N * K]``, where groups lie one after the other."""
    ends = accumulate(plan.row_TK.numel() for plan in plans)
    return torch.cat([(plan.row_TK + begin).flatten() for plan, begin in zip(plans, [0, *ends], strict=False)])
