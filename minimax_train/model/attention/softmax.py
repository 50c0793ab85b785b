"""Softmax attention with grouped queries and rotary positions on part of each head.

Shape legend: t tokens on this rank between attention layers, T tokens in here, D hidden, H query heads, G key-value
heads, K head dim, W heads side by side.
"""

from __future__ import annotations

from torch import Tensor, nn

from minimax_train.kernels.rope import rotate_heads
from minimax_train.kernels.softmax import softmax_attention
from minimax_train.model.attention.context import TokenContext
from minimax_train.model.attention.tokens import TokenExchange
from minimax_train.model.config import ModelConfig
from minimax_train.model.initialization import Initializer, xavier
from minimax_train.model.kernels import KernelConfig
from minimax_train.model.sharding import Linear, Sharding


class SoftmaxAttention(nn.Module):
    """Causal within each document; scores scaled by ``head_dim ** -0.5``."""

    def __init__(self, config: ModelConfig, layer: int, kernels: KernelConfig) -> None:
        super().__init__()
        self.config, self.implementation, self.rope = config, kernels.softmax, kernels.rope
        D, K = config.hidden_size, config.head_dim
        self.scale = K**-0.5
        self.q_proj = Linear(D, config.num_heads * K)
        self.k_proj = Linear(D, config.num_kv_heads * K)
        self.v_proj = Linear(D, config.num_kv_heads * K)
        self.o_proj = Linear(config.num_heads * K, D)
        self.tokens = TokenExchange()

    def forward(self, x_tD: Tensor, context: TokenContext) -> Tensor:
        K = self.config.head_dim
        q_TW, k_TW, v_TW = self.tokens.project(x_tD, self.q_proj, self.k_proj, self.v_proj)
        q_TW, k_TW = (self._rotated(x_TW, context) for x_TW in (q_TW, k_TW))
        out_THK = self.attend(*(x_TW.unflatten(-1, (-1, K)) for x_TW in (q_TW, k_TW, v_TW)), context)
        return self.tokens.scatter_sum(self.o_proj(out_THK.flatten(1)))

    def _rotated(self, x_TW: Tensor, context: TokenContext) -> Tensor:
        K = self.config.head_dim
        return rotate_heads(x_TW, context.cos_TR, context.sin_TR, head_dim=K, implementation=self.rope)

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, context: TokenContext) -> Tensor:
        """Attention over this rank's tokens; context parallelism puts its own in this place."""
        out_THK, _ = softmax_attention(
            q_THK, k_TGK, v_TGK, context.documents, scale=self.scale, implementation=self.implementation
        )
        return out_THK

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
        columns = {name: {"tp": 0} for name in ("q_proj.weight", "k_proj.weight", "v_proj.weight")}
        return columns | {"o_proj.weight": {"tp": 1}}
