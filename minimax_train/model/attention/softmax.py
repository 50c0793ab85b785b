"""Softmax attention with grouped queries and rotary positions on part of each head.

Shape legend: t tokens on this rank between attention layers, T tokens in here, D hidden, H query heads, G key-value
heads, K head dim, W heads side by side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from minimax_train.capture import uncaptured
from minimax_train.kernels.dispatch import AUTO
from minimax_train.kernels.rope import rotate_heads
from minimax_train.kernels.softmax import softmax_attention
from minimax_train.model.attention.context import TokenContext
from minimax_train.model.attention.kind import Activations, AttentionCost, AttentionKind, HuggingFaceNames
from minimax_train.model.initialization import Initializer, xavier
from minimax_train.model.kernels import KernelConfig
from minimax_train.model.ranks import ModelRanks
from minimax_train.model.sharding import Linear, Sharding, local
from minimax_train.parallel.context.softmax import METHODS, softmax_attention_cp

if TYPE_CHECKING:
    from minimax_train.model.config import ModelConfig


# The host plans the exchanges of each micro-batch.
_shared_attention = uncaptured(softmax_attention_cp)


class SoftmaxAttention(nn.Module):
    """Causal within each document; scores scaled by ``head_dim ** -0.5``."""

    def __init__(self, config: ModelConfig, layer: int, kernels: KernelConfig, ranks: ModelRanks) -> None:
        super().__init__()
        self.config, self.ranks = config, ranks
        self.implementation, self.rope = kernels.softmax, kernels.rope
        D, K = config.hidden_size, config.head_dim
        self.q_proj = Linear(D, config.num_heads * K)
        self.k_proj = Linear(D, config.num_kv_heads * K)
        self.v_proj = Linear(D, config.num_kv_heads * K)
        self.o_proj = Linear(config.num_heads * K, D)

    def forward(self, x_tD: Tensor, context: TokenContext) -> Tensor:
        K, tp = self.config.head_dim, self.ranks.tp
        weights_WD = (local(projection.weight) for projection in (self.q_proj, self.k_proj, self.v_proj))
        q_TW, k_TW, v_TW = tp.project(x_tD, *weights_WD)
        q_TW, k_TW = (self._rotated(x_TW, context) for x_TW in (q_TW, k_TW))
        q_THK, k_TGK, v_TGK = (x_TW.unflatten(-1, (-1, K)) for x_TW in (q_TW, k_TW, v_TW))
        out_THK = self._attend(q_THK, k_TGK, v_TGK, context)
        return self.o_proj(out_THK.flatten(1), tp.project_sum)

    def _rotated(self, x_TW: Tensor, context: TokenContext) -> Tensor:
        K = self.config.head_dim
        return rotate_heads(x_TW, context.cos_TR, context.sin_TR, head_dim=K, implementation=self.rope)

    def _attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, context: TokenContext) -> Tensor:
        inputs = (q_THK, k_TGK, v_TGK)
        options = {"scale": self.config.head_dim**-0.5, "implementation": self.implementation}
        if context.shard is None:
            return softmax_attention(*inputs, context.documents, **options)[0]
        assert self.ranks.cp is not None
        method = self.ranks.cp_methods.get("softmax_cp", AUTO)
        return _shared_attention(*inputs, context.shard, self.ranks.cp, method=method, **options)

    def initializers(self) -> dict[str, Initializer]:
        D, K, beta = self.config.hidden_size, self.config.head_dim, self.config.initial_gain
        width, kv_width = self.config.num_heads * K, self.config.num_kv_heads * K
        return {
            "q_proj.weight": xavier(D, width),
            "k_proj.weight": xavier(D, kv_width),
            "v_proj.weight": xavier(D, kv_width, beta),
            "o_proj.weight": xavier(width, D, beta),
        }

    def shardings(self) -> dict[str, Sharding]:
        columns: dict[str, Sharding] = {name: {"tp": 0} for name in ("q_proj.weight", "k_proj.weight", "v_proj.weight")}
        return columns | {"o_proj.weight": {"tp": 1}}


def _parameters(config: ModelConfig) -> int:
    return 2 * config.hidden_size * config.head_dim * (config.num_heads + config.num_kv_heads)


def _flops(config: ModelConfig, num_scores: float) -> float:
    """Projections; then every head's scores and the sum of values they weigh."""
    return 2 * _parameters(config) + 4 * config.num_heads * config.head_dim * num_scores


def _activations(config: ModelConfig) -> Activations:
    """q, k, v and output; and the log-sum-exp of every head."""
    return Activations(
        kept=2 * config.head_dim * (config.num_heads + config.num_kv_heads), cheap=0, float32=config.num_heads
    )


def _cost(config: ModelConfig) -> AttentionCost:
    """Scores decide; keys and values of all tokens."""
    return AttentionCost(0, lambda tokens, sequences: 2 * config.num_kv_heads * config.head_dim * tokens)


SOFTMAX = AttentionKind(
    letter="S",
    name="softmax",
    module=SoftmaxAttention,
    parameters=_parameters,
    flops=_flops,
    activations=_activations,
    cost=_cost,
    tp=("num_heads", "num_kv_heads"),
    cp={"softmax_cp": METHODS},
    hugging_face=HuggingFaceNames(
        layer_type="full_attention",
        attn_type=1,
        parameters={name: name for name in ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")},
        rotated=("q_proj.weight", "k_proj.weight"),
    ),
)
