"""The hybrid model: embedding, blocks, norm, head, of the parameters that are on this rank.

Shape legend: T tokens, D hidden, V vocabulary, L layers, E experts. Of tensor-parallel ranks each holds an equal
part of the tokens between the embedding, the attentions and the head, which work on those of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minimax_train.capture import Latest
from minimax_train.documents import Documents
from minimax_train.kernels.cross_entropy import linear_cross_entropy
from minimax_train.kernels.deferral import begin_layer
from minimax_train.kernels.rope import rotary_table
from minimax_train.model.attention.context import TokenContext
from minimax_train.model.config import ModelConfig
from minimax_train.model.experts import ExpertLayer, RouterReport
from minimax_train.model.initialization import Constant, Initializer, xavier
from minimax_train.model.kernels import KernelConfig
from minimax_train.model.memory import RECOMPUTATIONS
from minimax_train.model.norm import ResidualRMSNorm, RMSNorm, TwiceRMSNorm
from minimax_train.model.pools import TokenSpans
from minimax_train.model.ranks import ModelRanks
from minimax_train.model.recompute import selective
from minimax_train.model.sharding import Linear, Sharding, local
from minimax_train.parallel.context.layout import SequenceShard


class ModelLoss(NamedTuple):
    """Sums over this rank's tokens of a micro-batch, and the tokens' own; whoever owns the whole batch divides.

    Attributes:
        token_loss: cross-entropy in nats summed over tokens that have a label, scalar; this rank's part of it.
        token_losses_T: its summands, without gradient; with tensor parallelism, this rank's part of each.
        aux_loss: load-balancing loss summed over layers and packed sequences, before its coefficient, scalar; 0 where
            that is.
        entropy_L: of each router's probabilities in nats, summed over tokens; of the layers that ran, as the following.
        tokens_per_expert_LE: assignments to each expert in each layer, int64.
        dropped_L: assignments over capacity in each layer, int64.
    """

    token_loss: Tensor
    token_losses_T: Tensor
    aux_loss: Tensor
    entropy_L: Tensor
    tokens_per_expert_LE: Tensor
    dropped_L: Tensor


class StageOutput(NamedTuple):
    """What a part of the model that is not its last hands on, and sums over this rank's tokens as in
    :class:`ModelLoss`, of the part's own layers, in their order."""

    x_TD: Tensor
    aux_loss: Tensor
    entropy_L: Tensor
    tokens_per_expert_LE: Tensor
    dropped_L: Tensor


class ModelPart(NamedTuple):
    """Consecutive layers, which run as one: a pipeline stage, or all.

    Attributes:
        layers: their numbers in the whole model.
        is_first: whether the embedding comes before them.
        is_last: whether norm, head and loss come after them.
    """

    layers: range
    is_first: bool = True
    is_last: bool = True


class Block(nn.Module):
    """Attention, then experts, each a DeepNorm residual ``h = norm(x); y = alpha h + f(h)`` (arXiv 2203.00555)."""

    def __init__(self, config: ModelConfig, layer: int, kernels: KernelConfig, ranks: ModelRanks) -> None:
        super().__init__()
        self.alpha, self.recomputation = config.alpha, "none"
        self.attention_norm = TwiceRMSNorm(config.hidden_size, config.norm_eps, kernels)
        self.attention = config.attentions[layer].module(config, layer, kernels, ranks)
        self.expert_norm = ResidualRMSNorm(config.hidden_size, config.norm_eps, kernels)
        self.experts = ExpertLayer(config, kernels, ranks)

    def forward(self, x_TD: Tensor, context: TokenContext, spans: TokenSpans) -> tuple[Tensor, RouterReport]:
        # Inside the module rather than around it, so that a sharding engine gathers the weights once per pass.
        if self.recomputation == "none" or not torch.is_grad_enabled():
            return self._forward(x_TD, context, spans)
        if self.recomputation == "full":
            return checkpoint(self._forward, x_TD, context, spans, use_reentrant=False, preserve_rng_state=False)
        with selective():
            return self._forward(x_TD, context, spans)

    def _forward(self, x_TD: Tensor, context: TokenContext, spans: TokenSpans) -> tuple[Tensor, RouterReport]:
        h_TD, residual_TD = self.attention_norm(x_TD)
        h_TD = self.expert_norm(residual_TD, self.attention(h_TD, context), self.alpha)
        return self.experts(h_TD, spans, self.alpha)

    def initializers(self) -> dict[str, Initializer]:
        return {"attention_norm.weight": Constant(1.0), "expert_norm.weight": Constant(1.0)}


class Embedding(nn.Embedding):
    """Without initial weights where it has no memory: PyTorch would import its compiler for them, for seconds."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class HybridModel(nn.Module):
    """Decoder-only language model over packed documents.

    Args:
        kernels: which implementation of each op runs.
        ranks: those that compute it together; None for this one alone.
        parts: those that are on this rank, in the order of the model; None for all of it. Parameters have the names of
            the whole model.
    """

    def __init__(
        self,
        config: ModelConfig,
        kernels: KernelConfig | None = None,
        ranks: ModelRanks | None = None,
        parts: Sequence[ModelPart] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.parts = [ModelPart(range(config.num_layers))] if parts is None else list(parts)
        self.kernels, self.ranks = kernels, ranks = kernels or KernelConfig(), ranks or ModelRanks()
        if any(part.is_first for part in self.parts):
            self.embedding = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList()
        for layer in (layer for part in self.parts for layer in part.layers):
            self.layers.add_module(str(layer), Block(config, layer, kernels, ranks))
        if any(part.is_last for part in self.parts):
            self.norm = RMSNorm(config.hidden_size, config.norm_eps, kernels)
            self.head = Linear(config.hidden_size, config.vocab_size)
        self.vocabulary = ranks.tp.vocabulary(config.vocab_size)

    def set_recomputation(self, recomputation: Sequence[str]) -> None:
        """What the backward pass of each block computes again rather than keep: one of :data:`RECOMPUTATIONS`.

        Args:
            recomputation: of all layers of the whole model.
        """
        for layer, block in self.layers.named_children():
            assert isinstance(block, Block) and recomputation[int(layer)] in RECOMPUTATIONS
            block.recomputation = recomputation[int(layer)]

    def forward(
        self,
        tokens_T: Tensor,
        documents: Documents,
        labels_T: Tensor | None = None,
        *,
        num_sequences: int = 1,
        shard: SequenceShard | Latest[SequenceShard] | None = None,
        rope_base: float | None = None,
        part: int = 0,
        x_TD: Tensor | None = None,
    ) -> Tensor | ModelLoss | StageOutput:
        """Logits ``[T, V]`` (of this rank's vocabulary), or the loss when there are labels; of a part that is not the
        last, what it hands on.

        Args:
            tokens_T: int64 token ids, the packed sequences of the micro-batch one after the other.
            documents: the documents in them; every packed sequence starts one.
            labels_T: int64 next tokens, ``IGNORE_INDEX`` (-100) where there is none.
            num_sequences: how many packed sequences, all of one length.
            shard: which of their tokens these are, when context-parallel ranks share them.
            rope_base: base of the rotary frequencies; the one the model began with if None.
            part: which of this rank's parts runs.
            x_TD: what the part before handed on; None for the first.
        """
        layers, is_first, is_last = self.parts[part]
        base = self.config.rope_base if rope_base is None else rope_base
        cos_TR, sin_TR = rotary_table(documents.positions_T, self.config.rotary_dim, base)
        context = TokenContext(documents, shard, cos_TR, sin_TR)
        spans = TokenSpans.of(documents, shard, num_sequences, self.ranks)
        if is_first:
            x_TD = self.ranks.tp.scatter_sum(self._embed(tokens_T))
        assert x_TD is not None
        reports: list[RouterReport] = []
        for layer in layers:
            x_TD, report = self.layers.get_submodule(str(layer))(begin_layer(x_TD, layer), context, spans)
            reports.append(report)
        routing = {
            "aux_loss": torch.stack([report.aux_loss for report in reports]).sum(),
            "entropy_L": torch.stack([report.entropy for report in reports]),
            "tokens_per_expert_LE": torch.stack([report.tokens_per_expert_E for report in reports]),
            "dropped_L": torch.stack([report.dropped for report in reports]),
        }
        if not is_last:
            return StageOutput(x_TD, **routing)
        x_TD = self.ranks.tp.gather(self.norm(x_TD))
        if labels_T is None:
            return self.head(x_TD)
        token_loss, token_losses_T = linear_cross_entropy(
            x_TD, local(self.head.weight), labels_T, shard=self.vocabulary, implementation=self.kernels.loss
        )
        return ModelLoss(token_loss, token_losses_T, **routing)

    def _embed(self, tokens_T: Tensor) -> Tensor:
        """Embeddings in this rank's part of the vocabulary; zero for a token of another's."""
        weight_VD = local(self.embedding.weight)
        if self.vocabulary is None:
            return F.embedding(tokens_T, weight_VD)
        place_T = tokens_T - self.vocabulary.start
        is_here_T = (place_T >= 0) & (place_T < len(weight_VD))
        return F.embedding(place_T.where(is_here_T, 0), weight_VD).where(is_here_T[:, None], 0)

    def shardings(self) -> dict[str, Sharding]:
        return {name: {"tp": 0} for name in ("embedding.weight", "head.weight") if self._holds(name)}

    def initializers(self) -> dict[str, Initializer]:
        D, V = self.config.hidden_size, self.config.vocab_size
        rules = {"embedding.weight": xavier(V, D), "norm.weight": Constant(1.0), "head.weight": xavier(D, V)}
        return {name: rule for name, rule in rules.items() if self._holds(name)}

    def _holds(self, parameter: str) -> bool:
        """Whether one outside the layers is on this rank."""
        return hasattr(self, parameter.partition(".")[0])
