"""The hybrid model: embedding, blocks, norm, head. Knows nothing of how it is sharded.

Shape legend: T tokens, D hidden, V vocabulary, L layers, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minimax_train.documents import Documents
from minimax_train.kernels.cross_entropy import VocabularyShard, linear_cross_entropy
from minimax_train.kernels.rope import rotary_table
from minimax_train.model.attention import ATTENTIONS
from minimax_train.model.attention.context import TokenContext, TokenShare
from minimax_train.model.attention.tokens import TokenExchange
from minimax_train.model.config import ModelConfig
from minimax_train.model.experts import ExpertLayer, RouterReport
from minimax_train.model.initialization import Constant, Initializer, xavier
from minimax_train.model.kernels import KernelConfig
from minimax_train.model.norm import ResidualRMSNorm, RMSNorm
from minimax_train.model.sharding import Linear, Sharding, local
from minimax_train.parallel.context.layout import SequenceShard


class ModelLoss(NamedTuple):
    """Sums over this rank's tokens of a micro-batch; whoever owns the whole batch divides.

    Attributes:
        token_loss: cross-entropy in nats summed over tokens that have a label, scalar; this rank's part of it.
        aux_loss: load-balancing loss summed over layers and rows, before its coefficient, scalar; 0 where that is.
        entropy: of the router's probabilities in nats, summed over tokens and layers, scalar.
        load_LE: choices of each expert in each layer, int64.
        dropped: choices over capacity in all layers, int64 scalar.
    """

    token_loss: Tensor
    aux_loss: Tensor
    entropy: Tensor
    load_LE: Tensor
    dropped: Tensor


class Block(nn.Module):
    """Attention, then experts, each a DeepNorm residual ``h = norm(x); y = alpha h + f(h)`` (arXiv 2203.00555)."""

    def __init__(self, config: ModelConfig, layer: int, kernels: KernelConfig) -> None:
        super().__init__()
        self.alpha = config.alpha
        self.recompute = False
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, kernels)
        self.attention = ATTENTIONS[config.layer_kinds[layer]](config, layer, kernels)
        self.expert_norm = ResidualRMSNorm(config.hidden_size, config.norm_eps, kernels)
        self.experts = ExpertLayer(config, kernels)

    def forward(self, x_TD: Tensor, context: TokenContext) -> tuple[Tensor, RouterReport]:
        # Inside the module rather than around it, so that a sharding engine gathers the weights once per pass.
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._forward, x_TD, context, use_reentrant=False, preserve_rng_state=False)
        return self._forward(x_TD, context)

    def _forward(self, x_TD: Tensor, context: TokenContext) -> tuple[Tensor, RouterReport]:
        h_TD = self.attention_norm(x_TD)
        h_TD = self.expert_norm(h_TD, self.attention(h_TD, context), self.alpha)
        y_TD, report = self.experts(h_TD, context)
        return torch.add(y_TD, h_TD, alpha=self.alpha), report

    def initializers(self) -> dict[str, Initializer]:
        return {"attention_norm.weight": Constant(1.0), "expert_norm.weight": Constant(1.0)}


class HybridModel(nn.Module):
    """Decoder-only language model over packed documents."""

    def __init__(self, config: ModelConfig, kernels: KernelConfig | None = None) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels = kernels or KernelConfig()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer, kernels) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, kernels)
        self.head = Linear(config.hidden_size, config.vocab_size)
        self.tokens = TokenExchange()
        self.share = TokenShare()
        self.vocabulary: VocabularyShard | None = None  # the part on this rank, if not all

    def forward(
        self,
        tokens_T: Tensor,
        documents: Documents,
        labels_T: Tensor | None = None,
        *,
        num_rows: int = 1,
        shard: SequenceShard | None = None,
        rope_base: float | None = None,
    ) -> Tensor | ModelLoss:
        """Logits ``[T, V]`` (of this rank's vocabulary), or the loss when there are labels.

        Args:
            tokens_T: int64 token ids, the rows of the micro-batch one after the other.
            documents: the documents in them; every row starts one.
            labels_T: int64 next tokens, ``IGNORE_INDEX`` (-100) where there is none.
            num_rows: how many rows; expert capacity and the auxiliary loss are counted within each.
            shard: which tokens of those rows these are, when several ranks share them.
            rope_base: base of the rotary frequencies; the one the model began with if None.
        """
        base = self.config.rope_base if rope_base is None else rope_base
        cos_TR, sin_TR = rotary_table(documents.positions_T, self.config.rotary_dim, base)
        context = TokenContext(documents, num_rows, shard, self.share, cos_TR, sin_TR)
        x_TD = self.tokens.scatter_sum(self._embed(tokens_T))
        reports: list[RouterReport] = []
        for block in self.layers:
            x_TD, report = block(x_TD, context)
            reports.append(report)
        x_TD = self.tokens.gather(self.norm(x_TD))
        if labels_T is None:
            return self.head(x_TD)
        return ModelLoss(
            token_loss=linear_cross_entropy(
                x_TD, local(self.head.weight), labels_T, shard=self.vocabulary, implementation=self.kernels.loss
            ),
            aux_loss=torch.stack([report.aux_loss for report in reports]).sum(),
            entropy=torch.stack([report.entropy for report in reports]).sum(),
            load_LE=torch.stack([report.load_E for report in reports]),
            dropped=torch.stack([report.dropped for report in reports]).sum(),
        )

    def _embed(self, tokens_T: Tensor) -> Tensor:
        """Rows of this rank's part of the table; zero for a token of another's."""
        weight_VD = local(self.embedding.weight)
        if self.vocabulary is None:
            return F.embedding(tokens_T, weight_VD)
        place_T = tokens_T - self.vocabulary.start
        is_here_T = (place_T >= 0) & (place_T < len(weight_VD))
        return F.embedding(place_T.where(is_here_T, 0), weight_VD).where(is_here_T[:, None], 0)

    def shardings(self) -> dict[str, Sharding]:
        return {name: {"tp": 0} for name in ("embedding.weight", "head.weight")}

    def initializers(self) -> dict[str, Initializer]:
        D, V = self.config.hidden_size, self.config.vocab_size
        return {"embedding.weight": xavier(V, D), "norm.weight": Constant(1.0), "head.weight": xavier(D, V)}
