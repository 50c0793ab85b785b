"""Experts spread over ranks: expert parallelism, expert tensor parallelism, transfers beside GEMMs.

The layer itself is ``kernels/experts/mlp.py``. Here are its dispatchers (``dispatchers.py``): with more than one rank
on ``ep`` routed tokens travel, one for each assignment of a token; with ``etp`` alone tokens travel, each once. Which
token goes where says ``buckets.py``; how transfers run beside GEMMs, ``overlap.py``. ``docs/expert-parallelism.md`` has
the picture.

Shape legend: T tokens, K assignments per token, D hidden, E experts, F expert hidden; e, f the share of one rank.
"""

from __future__ import annotations

from torch import Tensor

from minimax_train.kernels.dispatch import AUTO
from minimax_train.kernels.experts import choose_implementation, expert_mlp, grouped_experts
from minimax_train.parallel.communicator import Communicator
from minimax_train.parallel.experts.buckets import ExpertBuckets
from minimax_train.parallel.experts.dispatchers import RoutedTokenDispatcher, TokenDispatcher
from minimax_train.parallel.experts.overlap import CommunicationStream

__all__ = ["ExpertParallel"]


class ExpertParallel:
    """The expert layer of one rank of an expert grid; made once, called by every layer.

    Rank (i of ep, j of etp) holds experts ``[i * E / ep, (i + 1) * E / ep)`` and of each the j-th slice of the expert
    hidden size. Every rank brings tokens of its own.

    Args:
        ep: the ranks with the same j.
        etp: the ranks with the same i. The two must not share a process group: its transfers would take turns.
        num_experts: E, of the whole layer.
        token_groups: in how many groups tokens (etp alone) or routed tokens are cut, so that one group's transfers run
            beside another's GEMMs. A group of routed tokens has those for some of each rank's experts; where a rank has
            too few of them for that, its first and last expert share their tokens with the groups before and after.

    Raises:
        ValueError: when the experts do not divide, or ``token_groups`` is not positive.
    """

    def __init__(self, ep: Communicator, etp: Communicator, *, num_experts: int, token_groups: int = 1) -> None:
        if num_experts % ep.size:
            raise ValueError(f"parallel.ep={ep.size}: must divide the number of experts, {num_experts}")
        if token_groups < 1:
            raise ValueError(f"parallel.token_groups={token_groups}: must be positive")
        # Every etp rank needs what stays on another one, too.
        stays = ep.size > 1 and etp.size == 1 and token_groups == 1
        self.buckets = ExpertBuckets(num_experts, ep.size, token_groups, own=ep.rank if stays else None)
        self.ep, self.etp = CommunicationStream(ep), CommunicationStream(etp)

    def __call__(
        self,
        x_TD: Tensor,
        weights_TK: Tensor,
        experts_TK: Tensor,
        gate_up_e2fD: Tensor,
        down_eDf: Tensor,
        *,
        residual: float = 0.0,
        implementation: str = AUTO,
    ) -> Tensor:
        """``y_t = residual x_t + sum_k weight_tk * expert_tk(x_t)``, differentiable in x, weights and both experts'
        weights.

        Gradients of the experts' weights are sums over the tokens of all ranks of both axes. With more than one rank on
        ep, the host waits for a GPU once per forward pass, for the split sizes of every rank, and never else.

        Args:
            x_TD: this rank's tokens, any floating dtype. With ``etp`` alone, as many as every other rank has.
            experts_TK: experts of the whole layer, int64; -1 is no expert.
            gate_up_e2fD: slices of gate over slices of up; the dtype of x.
            implementation: as of :func:`minimax_train.kernels.experts.expert_mlp`.
        """
        buckets, weights = self.buckets, (gate_up_e2fD, down_eDf)
        if len(gate_up_e2fD) != buckets.local_experts:
            raise ValueError(f"weights of {len(gate_up_e2fD)} experts: this rank holds {buckets.local_experts}")
        if self.ep.size == 1 and (self.etp.size == 1 or not len(x_TD)):
            return expert_mlp(x_TD, weights_TK, experts_TK, *weights, residual=residual, implementation=implementation)
        gemms, ops = choose_implementation(x_TD, down_eDf.shape[2], implementation)
        if self.ep.size == 1:
            dispatcher = TokenDispatcher(experts_TK, buckets.num_experts, buckets.groups, self.etp, ops)
        else:
            dispatcher = RoutedTokenDispatcher(experts_TK, buckets, self.ep, self.etp, ops)
        return grouped_experts(x_TD, weights_TK, *weights, dispatcher, gemms, residual)
