"""Lightning attention as a layer of MiniMax-01 (arXiv 2501.08313, section 2.2).

Shape legend: t tokens on this rank between attention layers, T tokens in here, D hidden, H heads, K head dim, W heads
side by side.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from minimax_train.kernels.lightning import lightning_attention, lightning_slopes
from minimax_train.kernels.silu import silu_qkv
from minimax_train.model.attention.context import TokenContext
from minimax_train.model.attention.tokens import TokenExchange
from minimax_train.model.config import ModelConfig
from minimax_train.model.initialization import Constant, Initializer, xavier
from minimax_train.model.kernels import KernelConfig
from minimax_train.model.norm import GatedRMSNorm
from minimax_train.model.sharding import Linear, Sharding

# Transformers and the original model leave this norm at its default epsilon, whatever the others use.
NORM_EPS = 1e-6


@cache
def _slopes_on(device: torch.device, num_heads: int, layer: int, num_layers: int, start: int, stop: int) -> Tensor:
    """The same tensor in every call, by which others keep what they derive from it."""
    return lightning_slopes(num_heads, layer, num_layers)[start:stop].to(device)


class LightningAttention(nn.Module):
    """SiLU on q, k and v; linear attention with per-head decay; RMSNorm over all heads; sigmoid gate; projection.

    ``qkv_proj`` is laid out per head as (q, k, v).
    """

    def __init__(self, config: ModelConfig, layer: int, kernels: KernelConfig) -> None:
        super().__init__()
        self.config, self.layer, self.implementation = config, layer, kernels.lightning
        self.silu = kernels.silu
        D, width = config.hidden_size, config.num_heads * config.head_dim
        self.qkv_proj = Linear(D, 3 * width)
        self.gate_proj = Linear(D, width)
        self.norm = GatedRMSNorm(width, NORM_EPS, kernels)
        self.o_proj = Linear(width, D)
        self.tokens = TokenExchange()
        self.heads = (0, config.num_heads)  # first and after the last of all, on this rank

    def forward(self, x_tD: Tensor, context: TokenContext) -> Tensor:
        config = self.config
        qkv_TW, gate_TW = self.tokens.project(x_tD, self.qkv_proj, self.gate_proj)
        qkv_THK = silu_qkv(qkv_TW, head_dim=config.head_dim, implementation=self.silu)
        slopes_H = _slopes_on(x_tD.device, config.num_heads, self.layer, config.num_layers, *self.heads)
        out_THK = self.attend(*qkv_THK, slopes_H, context)
        return self.tokens.scatter_sum(self.o_proj(self.norm(out_THK.flatten(1), gate_TW)))

    def attend(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, slopes_H: Tensor, context: TokenContext) -> Tensor:
        """Attention over this rank's tokens; context parallelism puts its own in this place."""
        out_THK, _ = lightning_attention(
            q_THK,
            k_THK,
            v_THK,
            slopes_H,
            context.documents,
            implementation=self.implementation,
        )
        return out_THK

    def initializers(self) -> dict[str, Initializer]:
        D, K = self.config.hidden_size, self.config.head_dim
        width, beta = self.config.num_heads * K, self.config.initial_gain
        return {
            "qkv_proj.weight": xavier(D, width, row_gain=lambda row: torch.where(row // K % 3 == 2, beta, 1.0)),
            "gate_proj.weight": xavier(D, width),
            "norm.weight": Constant(1.0),
            "o_proj.weight": xavier(width, D, beta),
        }

    def shardings(self) -> dict[str, Sharding]:
        columns = {name: {"tp": 0} for name in ("qkv_proj.weight", "gate_proj.weight", "norm.weight")}
        return columns | {"o_proj.weight": {"tp": 1}}
