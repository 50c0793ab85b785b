"""The mixture of experts: router and SwiGLU experts.

Shape legend: T tokens, D hidden, E experts, F expert hidden, K choices per token, P pieces of rows on this rank, J
places of a piece and B pools whose choices are counted together.
"""

from __future__ import annotations

from collections.abc import Callable
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
from minimax_train.model.attention.context import TokenContext, TokenPieces, TokenPools
from minimax_train.model.config import ModelConfig
from minimax_train.model.initialization import Initializer, xavier
from minimax_train.model.kernels import KernelConfig
from minimax_train.model.sharding import Linear, Sharding, local


class RouterReport(NamedTuple):
    """What one expert layer says of its routing, summed over this rank's tokens of the micro-batch.

    Attributes:
        aux_loss: load-balancing loss before its coefficient, scalar, differentiable; 0 where the coefficient is.
        entropy: of the router's probabilities, in nats, summed over tokens, scalar.
        load_E: choices of each expert before any were dropped, int64.
        dropped: choices over capacity, int64 scalar.
    """

    aux_loss: Tensor
    entropy: Tensor
    load_E: Tensor
    dropped: Tensor


class Experts(nn.Module):
    """The weights of all experts, gate over up and down, and what they compute."""

    def __init__(self, config: ModelConfig, kernels: KernelConfig) -> None:
        super().__init__()
        self.config, self.implementation = config, kernels.experts
        E, D, hidden = config.num_experts, config.hidden_size, config.expert_hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2, hidden, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, hidden))

    def forward(self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
        gate_up_E2FD, down_EDF = local(self.gate_up_proj).flatten(1, 2), local(self.down_proj)
        return self.compute(x_TD, weights_TK, experts_TK, gate_up_E2FD, down_EDF)

    def compute(
        self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
    ) -> Tensor:
        """All experts are here; expert parallelism puts its own in this place."""
        return expert_mlp(x_TD, weights_TK, experts_TK, gate_up_E2FD, down_EDF, implementation=self.implementation)

    def shardings(self) -> dict[str, Sharding]:
        return {"gate_up_proj": {"ep": 0, "etp": 2}, "down_proj": {"ep": 0, "etp": 2}}

    def initializers(self) -> dict[str, Initializer]:
        D, hidden, beta = self.config.hidden_size, self.config.expert_hidden_size, self.config.initial_gain
        return {"gate_up_proj": xavier(D, hidden, beta), "down_proj": xavier(hidden, D, beta)}


class ExpertLayer(nn.Module):
    """Top-k routing by softmax, renormalised over the k, then the experts."""

    def __init__(self, config: ModelConfig, kernels: KernelConfig) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        self.router = Linear(config.hidden_size, config.num_experts)
        self.mlp = Experts(config, kernels)
        # By scope of the pools: sums counts over the ranks that hold tokens of a pool. Parallelism adds its own.
        self.sum_over_ranks: dict[str, Callable[[Tensor], Tensor]] = {}

    def forward(self, x_TD: Tensor, context: TokenContext) -> tuple[Tensor, RouterReport]:
        config, pieces = self.config, context.pieces
        # Logits are float32 at least, of the weights as the engine gathers them: bfloat16 logits tie too often.
        logits_TE, x_TD = router_logits(x_TD, self.router.weight, implementation=self.kernels.router)
        probabilities_TE, weights_TK, experts_TK, load_PE = route(
            logits_TE,
            config.experts_per_token,
            pieces.piece_T,
            len(pieces.row_P),
            implementation=self.kernels.router,
        )
        counts = self._count(load_PE, context)
        aux_loss = probabilities_TE.new_zeros(())
        if config.aux_loss_coefficient > 0:
            aux_loss = self._balance(probabilities_TE, pieces, *counts[config.aux_loss_scope])
        if config.capacity_factor is not None:
            experts_TK = self._drop(experts_TK, pieces, load_PE, *counts[config.capacity_scope])
        with torch.no_grad():
            entropy = torch.special.entr(probabilities_TE).sum()
        y_TD = self.mlp(x_TD, weights_TK, experts_TK)
        return y_TD, RouterReport(aux_loss, entropy, load_PE.sum(0), (experts_TK < 0).sum())

    def _count(self, load_PE: Tensor, context: TokenContext) -> dict[str, tuple[TokenPools, Tensor]]:
        """For each scope in use its pools, and the choices at every place of them on all ranks, ``[J, B, E]``."""
        config = self.config
        scopes = set()
        if config.aux_loss_coefficient > 0:
            scopes.add(config.aux_loss_scope)
        if config.capacity_factor is not None:
            scopes.add(config.capacity_scope)
        counts = {}
        for scope in sorted(scopes):
            pools = context.pools(scope)
            load_JBE = pools.spread(load_PE)
            reduce = self.sum_over_ranks.get(scope)
            counts[scope] = pools, (reduce(load_JBE) if reduce else load_JBE)
        return counts

    def _balance(self, probabilities_TE: Tensor, pieces: TokenPieces, pools: TokenPools, load_JBE: Tensor) -> Tensor:
        fraction_PE = load_JBE.sum(0)[pools.pool_P].to(probabilities_TE.dtype) / pools.tokens
        return load_balancing_loss(probabilities_TE, pieces.piece_T, fraction_PE, pieces.row_length)

    def _drop(
        self, experts_TK: Tensor, pieces: TokenPieces, load_PE: Tensor, pools: TokenPools, load_JBE: Tensor
    ) -> Tensor:
        taken_PE = (load_JBE.cumsum(0) - load_JBE)[pools.place_P, pools.pool_P]
        return drop_over_capacity(
            experts_TK, pieces.piece_T, load_PE, taken_PE, self.config.expert_capacity(pools.tokens)
        )

    def initializers(self) -> dict[str, Initializer]:
        return {"router.weight": xavier(self.config.hidden_size, self.config.num_experts)}
