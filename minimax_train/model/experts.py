"""The mixture of experts: router and SwiGLU experts.

Shape legend: T tokens, D hidden, E experts, F expert hidden, K choices per token, P pieces of rows on this rank, J
chunks and B rows of the micro-batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from minimax_train.kernels.experts import (
    drop_over_capacity,
    expert_mlp,
    load_balancing_loss,
    route,
    router_logits,
)
from minimax_train.model.attention.context import TokenContext
from minimax_train.model.config import KernelConfig, ModelConfig
from minimax_train.model.initialization import Initializer, xavier


class RouterReport(NamedTuple):
    """What one expert layer says of its routing, summed over this rank's tokens of the micro-batch.

    Attributes:
        aux_loss: load-balancing loss before its coefficient, scalar, differentiable.
        load_E: choices of each expert before any were dropped, int64.
        dropped: choices over capacity, int64 scalar.
    """

    aux_loss: Tensor
    load_E: Tensor
    dropped: Tensor


class ExpertLayer(nn.Module):
    """Top-k routing by softmax, renormalised over the k; experts' weights fused as gate over up, and down."""

    def __init__(self, config: ModelConfig, kernels: KernelConfig) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        E, D, hidden = config.num_experts, config.hidden_size, config.expert_hidden_size
        self.router = nn.Linear(D, E, bias=False)
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * hidden, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, hidden))

    def forward(self, x_TD: Tensor, context: TokenContext) -> tuple[Tensor, RouterReport]:
        config, pieces = self.config, context.pieces
        # Logits are float32 at least, of the weights as the engine gathers them: bfloat16 logits tie too often.
        logits_TE, x_TD = router_logits(x_TD, self.router.weight, implementation=self.kernels.router)
        probabilities_TE, weights_TK, experts_TK, load_PE = route(
            logits_TE,
            config.experts_per_token,
            pieces.piece_T,
            len(pieces.rows_P),
            implementation=self.kernels.router,
        )
        load_JBE = load_PE.new_zeros(pieces.num_chunks, pieces.num_rows, config.num_experts)
        load_JBE[pieces.chunks_P, pieces.rows_P] = load_PE
        load_JBE = self.sum_over_ranks(load_JBE)
        row_load_PE = load_JBE.sum(0)[pieces.rows_P]
        aux_loss = load_balancing_loss(probabilities_TE, pieces.piece_T, row_load_PE, pieces.row_length)
        if config.capacity_factor is not None:
            taken_PE = (load_JBE.cumsum(0) - load_JBE)[pieces.chunks_P, pieces.rows_P]
            capacity = config.expert_capacity(pieces.row_length)
            experts_TK = drop_over_capacity(experts_TK, pieces.piece_T, load_PE, taken_PE, capacity)
        y_TD = expert_mlp(
            x_TD, weights_TK, experts_TK, self.gate_up_proj, self.down_proj, implementation=self.kernels.experts
        )
        return y_TD, RouterReport(aux_loss, load_PE.sum(0), (experts_TK < 0).sum())

    def sum_over_ranks(self, load_JBE: Tensor) -> Tensor:
        """Sum over the ranks that share the rows; context parallelism puts its own in this place."""
        return load_JBE

    def initializers(self) -> dict[str, Initializer]:
        config = self.config
        E, D, hidden, beta = config.num_experts, config.hidden_size, config.expert_hidden_size, config.initial_gain
        return {
            "router.weight": xavier(D, E),
            "gate_up_proj": xavier(D, hidden, beta),
            "down_proj": xavier(hidden, D, beta),
        }
