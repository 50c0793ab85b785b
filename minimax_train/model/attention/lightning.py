"""Lightning attention as a layer of MiniMax-01 (arXiv 2501.08313, section 2.2).

Shape legend: t tokens on this rank between attention layers, T tokens in here, D hidden, H heads, K head dim, W heads
side by side.
"""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from minimax_train.capture import uncaptured
from minimax_train.kernels.dispatch import AUTO
from minimax_train.kernels.lightning import lightning_attention, lightning_slopes
from minimax_train.kernels.silu import silu_qkv
from minimax_train.model.attention.context import TokenContext
from minimax_train.model.attention.kind import Activations, AttentionCost, AttentionKind, HuggingFaceNames
from minimax_train.model.initialization import Constant, Initializer, xavier
from minimax_train.model.kernels import KernelConfig
from minimax_train.model.norm import GatedRMSNorm
from minimax_train.model.ranks import ModelRanks
from minimax_train.model.recompute import cheap
from minimax_train.model.sharding import Linear, Sharding, local
from minimax_train.parallel.context.lightning import METHODS, lightning_attention_cp

if TYPE_CHECKING:
    from minimax_train.model.config import ModelConfig

# Transformers and the original model leave this norm at its default epsilon, whatever the others use.
NORM_EPS = 1e-6


# The host plans the exchanges of each micro-batch.
_shared_attention = uncaptured(lightning_attention_cp)


@cache
def _slopes_on(device: torch.device, num_heads: int, layer: int, num_layers: int, heads: range) -> Tensor:
    """The same tensor in every call, by which others keep what they derive from it."""
    return lightning_slopes(num_heads, layer, num_layers)[heads.start : heads.stop].to(device)


class LightningAttention(nn.Module):
    """SiLU on q, k and v; linear attention with per-head decay; RMSNorm over all heads; sigmoid gate; projection.

    ``qkv_proj`` is laid out per head as (q, k, v).
    """

    def __init__(self, config: ModelConfig, layer: int, kernels: KernelConfig, ranks: ModelRanks) -> None:
        super().__init__()
        self.config, self.layer, self.ranks = config, layer, ranks
        self.implementation, self.silu = kernels.lightning, kernels.silu
        D, width = config.hidden_size, config.num_heads * config.head_dim
        self.qkv_proj = Linear(D, 3 * width)
        self.gate_proj = Linear(D, width)
        self.norm = GatedRMSNorm(width, NORM_EPS, kernels, ranks.tp)
        self.o_proj = Linear(width, D)

    def forward(self, x_tD: Tensor, context: TokenContext) -> Tensor:
        tp = self.ranks.tp
        qkv_TW, gate_TW = tp.project(x_tD, local(self.qkv_proj.weight), local(self.gate_proj.weight))
        silu = partial(silu_qkv, head_dim=self.config.head_dim, implementation=self.silu)
        q_THK, k_THK, v_THK = cheap(silu, qkv_TW)
        out_THK = self._attend(q_THK, k_THK, v_THK, context)
        return self.o_proj(self.norm(out_THK.flatten(1), gate_TW), tp.project_sum)

    def _attend(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, context: TokenContext) -> Tensor:
        config, ranks = self.config, self.ranks
        heads = ranks.tp.local_range(config.num_heads)
        slopes_H = _slopes_on(q_THK.device, config.num_heads, self.layer, config.num_layers, heads)
        inputs = (q_THK, k_THK, v_THK, slopes_H)
        if context.shard is None:
            return lightning_attention(*inputs, context.documents, implementation=self.implementation)[0]
        assert ranks.cp is not None
        options = {"method": ranks.cp_methods.get("linear_cp", AUTO), "implementation": self.implementation}
        return _shared_attention(*inputs, context.shard, ranks.cp, **options)

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
        columns: dict[str, Sharding] = {
            name: {"tp": 0} for name in ("qkv_proj.weight", "gate_proj.weight", "norm.weight")
        }
        return columns | {"o_proj.weight": {"tp": 1}}


def _parameters(config: ModelConfig) -> int:
    width = config.num_heads * config.head_dim
    return 5 * config.hidden_size * width + width


def _flops(config: ModelConfig, num_scores: float) -> float:
    """Projections; then every head's ``k v^T`` into its state and q times it, however long the context."""
    width = config.num_heads * config.head_dim
    return 10 * config.hidden_size * width + 4 * width * config.head_dim


def _activations(config: ModelConfig) -> Activations:
    """qkv, gate and output; then q, k and v after SiLU and the gated norm's output; and that norm's scale."""
    width = config.num_heads * config.head_dim
    return Activations(kept=5 * width, cheap=4 * width, float32=1)


def _cost(config: ModelConfig) -> AttentionCost:
    """Recurrence, SiLU and gate, fitted to measured steps; a state of each head and packed sequence, in float32."""
    width = config.num_heads * config.head_dim
    return AttentionCost(43 * width, lambda tokens, sequences: 2 * width * config.head_dim * sequences)


LIGHTNING = AttentionKind(
    letter="L",
    name="lightning",
    module=LightningAttention,
    parameters=_parameters,
    flops=_flops,
    activations=_activations,
    cost=_cost,
    tp=("num_heads",),
    cp={"linear_cp": METHODS},
    hugging_face=HuggingFaceNames(
        layer_type="linear_attention",
        attn_type=0,
        parameters={
            "qkv_proj.weight": "qkv_proj.weight",
            "gate_proj.weight": "output_gate.weight",
            "norm.weight": "norm.weight",
            "o_proj.weight": "out_proj.weight",
        },
        has_decays=True,
    ),
)
