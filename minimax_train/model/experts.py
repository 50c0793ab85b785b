"""The mixture of experts: router and SwiGLU experts.

Shape legend: T tokens, D hidden, E experts, F expert hidden, K choices per token, B rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimax_train.kernels.experts import (
    count_choices,
    drop_over_capacity,
    expert_mlp,
    load_balancing_loss,
    top_k_routing,
)
from minimax_train.model.attention.context import TokenContext
from minimax_train.model.config import KernelConfig, ModelConfig
from minimax_train.model.initialization import Initializer, xavier


class RouterReport(NamedTuple):
    """What one expert layer says of its routing, summed over the rows of the micro-batch.

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
        self.config, self.implementation = config, kernels.experts
        E, D, hidden = config.num_experts, config.hidden_size, config.expert_hidden_size
        self.router = nn.Linear(D, E, bias=False)
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * hidden, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, hidden))

    def forward(self, x_TD: Tensor, context: TokenContext) -> tuple[Tensor, RouterReport]:
        config, rows = self.config, context.num_rows
        # Routing decisions are made in float32 at least: bfloat16 logits tie too often.
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        logits_TE = F.linear(x_TD.to(dtype), self.router.weight.to(dtype))
        probabilities_TE, weights_TK, experts_TK = top_k_routing(logits_TE, config.experts_per_token)
        load_BE = count_choices(experts_TK, config.num_experts, rows)
        aux_loss = load_balancing_loss(probabilities_TE, load_BE)
        if config.capacity_factor is not None:
            share = experts_TK.numel() / rows / config.num_experts
            experts_TK = drop_over_capacity(experts_TK, config.num_experts, rows, int(config.capacity_factor * share))
        y_TD = expert_mlp(
            x_TD, weights_TK, experts_TK, self.gate_up_proj, self.down_proj, implementation=self.implementation
        )
        return y_TD, RouterReport(aux_loss, load_BE.sum(0), (experts_TK < 0).sum())

    def initializers(self) -> dict[str, Initializer]:
        config = self.config
        E, D, hidden, beta = config.num_experts, config.hidden_size, config.expert_hidden_size, config.initial_gain
        return {
            "router.weight": xavier(D, E),
            "gate_up_proj": xavier(D, hidden, beta),
            "down_proj": xavier(hidden, D, beta),
        }
