"""Experts spread over ranks: expert parallelism, expert tensor parallelism, transfers beside products.

With more than one rank on ``ep``, rows travel, one for each choice of a token (``layer.py``):

    permute            rows by group, rank and expert
    all-to-all, ep     to the ranks that hold the experts
    all-gather, etp    to the ranks that hold the slices of those experts
    sort               by expert
    grouped products
    unsort
    reduce-scatter, etp
    all-to-all, ep     back
    combine            weighted sum of a token's choices

With ``etp`` alone, tokens travel, each once (``sliced.py``):

    all-gather, etp    to the ranks, each of which holds a slice of every expert
    permute, grouped products, weighted sum of a token's choices
    reduce-scatter, etp

``docs/expert-parallelism.md`` has the picture. ``plan.py``: which row goes where. ``lanes.py``: the streams that
transfers run on, and the transfers of rows. ``pipeline.py``: groups one after the other.

Shape legend: T tokens, K choices per token, D hidden, E experts, F expert hidden; e, f the share of one rank; R = T * K
rows at home.
"""

from __future__ import annotations

from torch import Tensor

from minimax_train.kernels.dispatch import AUTO
from minimax_train.kernels.experts import combine, expert_mlp, permute, plan_rows
from minimax_train.parallel.communicator import Communicator
from minimax_train.parallel.experts.lanes import Lane
from minimax_train.parallel.experts.layer import expert_rows
from minimax_train.parallel.experts.plan import Cut, start_plan
from minimax_train.parallel.experts.sliced import sliced_experts

__all__ = ["ExpertParallel"]


class ExpertParallel:
    """The expert layer of one rank of an expert grid; made once, called by every layer.

    Rank (i of ep, j of etp) holds experts ``[i * E / ep, (i + 1) * E / ep)`` and of each the j-th slice of the expert
    hidden size. Every rank brings tokens of its own.

    Args:
        ep: the ranks with the same j.
        etp: the ranks with the same i. The two must not share a process group: its transfers would take turns.
        num_experts: E, of the whole layer.
        token_groups: in how many groups the tokens are cut, or the rows of their choices, so that one group's transfers
            run beside another's products. A group of rows has those bound for some of each rank's experts; where a rank
            has too few of them for that, its first and last expert share their rows with the groups before and after.

    Raises:
        ValueError: when the experts do not divide, or ``token_groups`` is not positive.
    """

    def __init__(self, ep: Communicator, etp: Communicator, *, num_experts: int, token_groups: int = 1) -> None:
        if num_experts % ep.size:
            raise ValueError(f"parallel.ep={ep.size}: must divide the number of experts, {num_experts}")
        if token_groups < 1:
            raise ValueError(f"parallel.token_groups={token_groups}: must be positive")
        self.cut = Cut(num_experts, ep.size, token_groups)
        self.ep, self.etp = Lane(ep), Lane(etp)

    def __call__(
        self,
        x_TD: Tensor,
        weights_TK: Tensor,
        experts_TK: Tensor,
        gate_up_e2fD: Tensor,
        down_eDf: Tensor,
        *,
        implementation: str = AUTO,
    ) -> Tensor:
        """``y_t = sum_k weight_tk * expert_tk(x_t)``, differentiable in x, weights and both experts' weights.

        Gradients of the experts' weights are sums over the tokens of all ranks of both axes. Where rows travel, the
        host waits for a GPU once per forward pass, for the number of rows that every rank sends, and never else.

        Args:
            x_TD: this rank's tokens, any floating dtype. With ``etp`` alone, as many as every other rank has.
            experts_TK: experts of the whole layer, int64; -1 chooses none.
            gate_up_e2fD: slices of gate over slices of up; the dtype of x.
            implementation: as of :func:`minimax_train.kernels.experts.expert_mlp`.
        """
        cut = self.cut
        if len(gate_up_e2fD) != cut.local_experts:
            raise ValueError(f"weights of {len(gate_up_e2fD)} experts: this rank holds {cut.local_experts}")
        if self.ep.size == 1:
            inputs = (x_TD, weights_TK, experts_TK, gate_up_e2fD, down_eDf)
            if self.etp.size == 1 or not len(x_TD):
                return expert_mlp(*inputs, implementation=implementation)
            return sliced_experts(*inputs, self.etp, cut.split(len(x_TD)), implementation)
        labels_TK, num_labels = cut.labels(experts_TK)
        rows = plan_rows(labels_TK, num_labels, implementation=implementation)
        pending = start_plan(cut, rows.offsets_E, self.ep, self.etp)
        x_RD = permute(x_TD, rows, implementation=implementation)  # beside the exchange of counts
        y_RD = expert_rows(x_RD, gate_up_e2fD, down_eDf, pending.wait(), self.ep, self.etp, implementation)
        return combine(y_RD, weights_TK, rows, implementation=implementation)
