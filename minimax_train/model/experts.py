"""The mixture of experts: router and SwiGLU experts.

Shape legend: T tokens, D hidden, E experts, F expert hidden, K experts per token; P spans of tokens on this rank, J
places of spans in each of B pools (``pools.py``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from minimax_train.kernels.experts import (
    drop_over_capacity,
    load_balancing_loss,
    route,
    router_logits,
)
from minimax_train.model.config import ModelConfig
from minimax_train.model.initialization import Initializer, xavier
from minimax_train.model.kernels import KernelConfig
from minimax_train.model.pools import TokenPools, TokenSpans
from minimax_train.model.ranks import ModelRanks
from minimax_train.model.sharding import Linear, Sharding, local


class RouterReport(NamedTuple):
    """What one expert layer says of its routing, summed over this rank's tokens of the micro-batch.

    Attributes:
        aux_loss: load-balancing loss before its coefficient, scalar, differentiable; 0 where the coefficient is.
        entropy: of the router's probabilities, in nats, summed over tokens, scalar.
        tokens_per_expert_E: assignments to each expert before any were dropped, int64.
        dropped: assignments over capacity, int64 scalar.
    """

    aux_loss: Tensor
    entropy: Tensor
    tokens_per_expert_E: Tensor
    dropped: Tensor


class Experts(nn.Module):
    """The weights of all experts, gate over up and down, and what they compute."""

    def __init__(self, config: ModelConfig, kernels: KernelConfig, ranks: ModelRanks) -> None:
        super().__init__()
        self.config, self.ranks, self.implementation = config, ranks, kernels.experts
        E, D, hidden = config.num_experts, config.hidden_size, config.expert_hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2, hidden, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, hidden))

    def forward(self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, residual: float) -> Tensor:
        inputs = (x_TD, weights_TK, experts_TK, local(self.gate_up_proj).flatten(1, 2), local(self.down_proj))
        return self.ranks.experts(*inputs, residual=residual, implementation=self.implementation)

    def shardings(self) -> dict[str, Sharding]:
        return {"gate_up_proj": {"ep": 0, "etp": 2}, "down_proj": {"ep": 0, "etp": 2}}

    def initializers(self) -> dict[str, Initializer]:
        D, hidden, beta = self.config.hidden_size, self.config.expert_hidden_size, self.config.initial_gain
        return {"gate_up_proj": xavier(D, hidden, beta), "down_proj": xavier(hidden, D, beta)}


class ExpertLayer(nn.Module):
    """Top-k routing by softmax, renormalised over the k, then the experts, and the residual."""

    def __init__(self, config: ModelConfig, kernels: KernelConfig, ranks: ModelRanks) -> None:
        super().__init__()
        self.config, self.kernels, self.ranks = config, kernels, ranks
        self.router = Linear(config.hidden_size, config.num_experts)
        self.mlp = Experts(config, kernels, ranks)

    def forward(self, x_TD: Tensor, spans: TokenSpans, residual: float) -> tuple[Tensor, RouterReport]:
        """``residual * x + experts(x)``."""
        config = self.config
        # Logits are float32 at least, of the weights as the engine gathers them: bfloat16 logits tie too often.
        logits_TE, x_TD = router_logits(x_TD, self.router.weight, implementation=self.kernels.router)
        weights_TK, experts_TK, count_PE, probability_PE, entropy = route(
            logits_TE,
            config.experts_per_token,
            spans.span_T,
            len(spans.sequence_P),
            implementation=self.kernels.router,
        )
        counts = self._count(count_PE, spans)
        aux_loss = probability_PE.new_zeros(())
        if config.aux_loss_coefficient > 0:
            aux_loss = self._balance(probability_PE, spans, *counts[config.aux_loss_scope])
        dropped = count_PE.new_zeros(())
        if config.capacity_factor is not None:
            experts_TK = self._drop(experts_TK, spans, count_PE, *counts[config.capacity_scope])
            dropped = (experts_TK < 0).sum()
        y_TD = self.mlp(x_TD, weights_TK, experts_TK, residual)
        return y_TD, RouterReport(aux_loss, entropy, count_PE.sum(0), dropped)

    def _count(self, count_PE: Tensor, spans: TokenSpans) -> dict[str, tuple[TokenPools, Tensor]]:
        """For each scope in use its pools, and the assignments at every place of them on all ranks, ``[J, B, E]``."""
        config = self.config
        scopes = set()
        if config.aux_loss_coefficient > 0:
            scopes.add(config.aux_loss_scope)
        if config.capacity_factor is not None:
            scopes.add(config.capacity_scope)
        counts = {}
        for scope in sorted(scopes):
            pools = spans.pools(scope)
            count_JBE, total = pools.spread(count_PE), self.ranks.sum_counts.get(scope)
            counts[scope] = pools, (total(count_JBE) if total else count_JBE)
        return counts

    def _balance(self, probability_PE: Tensor, spans: TokenSpans, pools: TokenPools, count_JBE: Tensor) -> Tensor:
        fraction_PE = pools.total(count_JBE).to(probability_PE.dtype) / pools.num_tokens
        return load_balancing_loss(probability_PE, fraction_PE, spans.sequence_length)

    def _drop(
        self, experts_TK: Tensor, spans: TokenSpans, count_PE: Tensor, pools: TokenPools, count_JBE: Tensor
    ) -> Tensor:
        capacity = self.config.expert_capacity(pools.num_tokens)
        return drop_over_capacity(experts_TK, spans.span_T, count_PE, pools.before(count_JBE), capacity)

    def initializers(self) -> dict[str, Initializer]:
        return {"router.weight": xavier(self.config.hidden_size, self.config.num_experts)}
