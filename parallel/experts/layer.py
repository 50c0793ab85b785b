"""The phases of an expert layer that compute, and the order of all phases, forward and backward.

Both directions send rows to their experts and back, and differ in what is computed there. Backward makes the gradients
of all groups' rows first and those of the weights last, once for all groups: beside them the last rows go home.

Shape legend: R rows at home, N rows as they arrive, M rows arranged by expert, m those of a group, D hidden, e experts
and f expert hidden of this rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimax_train.kernels.experts.phases import (
    experts_backward_down,
    experts_backward_gate_up,
    experts_backward_rows,
    experts_forward,
)
from minimax_train.parallel.experts.lanes import Arriving, Lane, Mark, dispatch, mark, send_back
from minimax_train.parallel.experts.pipeline import Pipeline, Returning
from minimax_train.parallel.experts.plan import Group, Order, Plan


def expert_rows(
    x_RD: Tensor, gate_up_e2fD: Tensor, down_eDf: Tensor, plan: Plan, ep: Lane, etp: Lane, implementation: str
) -> Tensor:
    """Each row through its expert, wherever that is: ``[R, D] -> [R, D]``, both in the order of the plan's labels."""
    return _ExpertRows.apply(x_RD, gate_up_e2fD, down_eDf, plan, ep, etp, implementation)


def start_round_trip(
    x_RD: Tensor, arranged_MD: Tensor, plan: Plan, ep: Lane, etp: Lane, compute: Callable[[int, Tensor], Tensor]
) -> Returning:
    """Send all groups' rows to their experts, compute there, and start sending the results home.

    Args:
        arranged_MD: filled with the rows of all groups, by expert.
        compute: index of a group and its arranged rows to the rows that go home.
    """
    home_RD = torch.empty_like(x_RD)
    start = mark(x_RD)

    def bring(group: Group) -> Arriving:
        return dispatch(group, x_RD, arranged_MD, start, ep, etp)

    def work(index: int, group: Group, arriving: Arriving) -> tuple[Mark, tuple[Tensor, ...]]:
        order = plan.orders[index]
        y_mD = compute(index, arrange(arriving.rows_ND, arranged_MD[group.here], order))
        y_ND = disarrange(y_mD, arriving.rows_ND, order)
        return send_back(group, y_ND, home_RD, mark(x_RD), ep, etp)

    return Pipeline(plan.groups, bring).run(work, Returning(home_RD, [(x_RD,)]))


def arrange(arrived_ND: Tensor, arranged_mD: Tensor, order: Order | None) -> Tensor:
    """Rows as they arrived -> by expert, without the padding."""
    return arranged_mD if order is None else torch.index_select(arrived_ND, 0, order.source_m, out=arranged_mD)


def disarrange(y_mD: Tensor, arrived_ND: Tensor, order: Order | None) -> Tensor:
    """Rows by expert -> as they arrived; what is in the padding does not matter."""
    if order is None:
        return y_mD
    return y_mD.index_select(0, order.place_N) if len(y_mD) else torch.empty_like(arrived_ND)


class _ExpertRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RD, gate_up_e2fD, down_eDf, plan, ep, etp, implementation):
        arranged_MD = x_RD.new_empty(plan.rows_here, x_RD.shape[1])
        gate_up_m2f = []

        def compute(index: int, x_mD: Tensor) -> Tensor:
            group: Group = plan.groups[index]
            weights = gate_up_e2fD[group.experts], down_eDf[group.experts]
            y_mD, kept_m2f = experts_forward(x_mD, *weights, plan.offsets(group), implementation=implementation)
            gate_up_m2f.append(kept_m2f)
            return y_mD

        returning = start_round_trip(x_RD, arranged_MD, plan, ep, etp, compute)
        ctx.save_for_backward(gate_up_e2fD, down_eDf, arranged_MD, *gate_up_m2f)
        ctx.plan, ctx.ep, ctx.etp, ctx.implementation = plan, ep, etp, implementation
        return returning.wait()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_RD):
        gate_up_e2fD, down_eDf, x_MD, *gate_up_m2f = ctx.saved_tensors
        plan, how = ctx.plan, {"implementation": ctx.implementation}
        f = down_eDf.shape[2]
        dy_MD = torch.empty_like(x_MD)
        act_Mf, d_gate_up_M2f = (x_MD.new_empty(len(x_MD), width) for width in (f, 2 * f))

        def compute(index: int, dy_mD: Tensor) -> Tensor:
            group: Group = plan.groups[index]
            weights = gate_up_e2fD[group.experts], down_eDf[group.experts]
            outputs = act_Mf[group.here], d_gate_up_M2f[group.here]
            return experts_backward_rows(dy_mD, gate_up_m2f[index], *weights, plan.offsets(group), *outputs, **how)

        returning = start_round_trip(dy_RD.contiguous(), dy_MD, plan, ctx.ep, ctx.etp, compute)
        d_gate_up_e2fD = experts_backward_gate_up(x_MD, d_gate_up_M2f, plan.offsets_e, **how)
        d_down_eDf = experts_backward_down(dy_MD, act_Mf, plan.offsets_e, **how)
        return returning.wait(), d_gate_up_e2fD, d_down_eDf, None, None, None, None
