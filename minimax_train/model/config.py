"""What a model is: its sizes, its layer pattern, its routing. Nothing about how it is run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from minimax_train.errors import require, require_choice
from minimax_train.fields import Range, check_fields
from minimax_train.model.attention import ATTENTIONS, AttentionKind

SCOPES = ("sequence", "global", "rank")
RENAMED_SCOPES = {"row": "sequence"}


def deep_norm_alpha(num_layers: int) -> float:
    """DeepNorm's residual factor ``(2 N)^(1/4)`` (arXiv 2203.00555, decoder-only)."""
    return (2 * num_layers) ** 0.25


@dataclass
class ModelConfig:
    """A hybrid model of the MiniMax-01 kind (arXiv 2501.08313, section 2).

    Attributes:
        vocab_size: rows of the embedding and of the output head, which are not tied.
        hidden_size: width of the residual stream.
        num_layers: blocks, each one attention and one expert layer.
        layer_pattern: kind of attention of each block, a letter of :data:`minimax_train.model.attention.ATTENTIONS`,
            such as ``L`` for lightning and ``S`` for softmax; repeated to ``num_layers``.
        num_heads, head_dim: query heads of every attention and their width; the product need not be hidden_size.
        num_kv_heads: key-value heads of softmax attention.
        rotary_dim: leading dimensions of each softmax head that carry rotary position embedding.
        rope_base: base of the rotary frequencies.
        num_experts, experts_per_token, expert_hidden_size: the SwiGLU experts of every block.
        capacity_factor: an expert takes at most ``capacity_factor * experts_per_token * tokens / num_experts``
            assignments of ``tokens``, the rest are dropped; none are if null.
        capacity_scope: which tokens share that capacity: ``sequence``: those of each packed sequence, which no grid
            and no batch size changes; ``global``: all ranks' tokens of a micro-batch, counted together before they
            are sent (MiniMax-01's global router); ``rank``: each rank's own, which drops most, kept to compare with.
            Each expert must be left at least one assignment of them. ``sequence`` without a capacity.
        aux_loss_coefficient: factor of the load-balancing loss
            :func:`minimax_train.kernels.experts.load_balancing_loss`, summed over layers, averaged over packed
            sequences; with 0 it is not computed, and not among the metrics.
        aux_loss_scope: the tokens over which it counts assignments, as for ``capacity_scope``; ``sequence`` without
            that loss.
        norm_eps: epsilon of every RMSNorm but the one inside lightning attention.
        residual_scale: factor alpha of the residual stream around attention and experts; null for DeepNorm's
            ``(2 num_layers)^(1/4)`` (arXiv 2203.00555, decoder-only). Initial weights do not depend on it.
    """

    vocab_size: Annotated[int, Range(1, 2**24)]
    hidden_size: Annotated[int, Range(1, 2**20)]
    num_layers: Annotated[int, Range(1, 2**12)]
    layer_pattern: str
    num_heads: Annotated[int, Range(1, 2**16)]
    num_kv_heads: Annotated[int, Range(1, 2**16)]
    head_dim: Annotated[int, Range(1, 2**16)]
    rotary_dim: Annotated[int, Range(0, 2**16)]
    rope_base: Annotated[float, Range(1, 1e12)]
    num_experts: Annotated[int, Range(1, 2**16)]
    experts_per_token: Annotated[int, Range(1, 2**16)]
    expert_hidden_size: Annotated[int, Range(1, 2**20)]
    capacity_factor: Annotated[float | None, Range(1e-6, 1e6, null="no limit")] = None
    capacity_scope: str = "sequence"
    aux_loss_coefficient: Annotated[float, Range(0, 1e6)] = 0.01
    aux_loss_scope: str = "sequence"
    norm_eps: Annotated[float, Range(1e-20, 1)] = 1e-5
    residual_scale: Annotated[float | None, Range(1e-6, 1e6, null="DeepNorm's (2 num_layers)^(1/4)")] = None

    def __post_init__(self) -> None:
        def check(name: str, holds: bool, accepted: str) -> None:
            require(holds, f"model.{name}", getattr(self, name), accepted)

        check_fields("model", self)
        length, layers = len(self.layer_pattern), self.num_layers
        fits = set(self.layer_pattern) <= set(ATTENTIONS) and 0 < length <= layers and layers % length == 0
        kinds = " and ".join(map(str, ATTENTIONS.values()))
        divides = f"its length {length} must divide model.num_layers={layers}"
        check("layer_pattern", fits, f"must be made of {kinds}, and {divides}")
        for name in dict.fromkeys(name for kind in ATTENTIONS.values() for name in kind.fields):
            readers = [kind for kind in ATTENTIONS.values() if name in kind.fields]
            present = [kind for kind in readers if kind in self.attentions]
            pattern = f"in model.layer_pattern={self.layer_pattern!r}"
            accepted = f"must be null: there is no {' or '.join(map(str, readers))} {pattern}"
            if present:
                accepted = f"must be given, for {' and '.join(map(str, present))} {pattern}"
            check(name, (getattr(self, name) is not None) == bool(present), accepted)
        fits = self.num_heads % self.num_kv_heads == 0
        check("num_kv_heads", fits, f"must divide model.num_heads={self.num_heads}")
        fits = self.rotary_dim % 2 == 0 and 0 <= self.rotary_dim <= self.head_dim
        check("rotary_dim", fits, f"must be even and between 0 and model.head_dim={self.head_dim}")
        fits = self.experts_per_token <= self.num_experts
        check("experts_per_token", fits, f"must be at most model.num_experts={self.num_experts}")
        for name in ("capacity_scope", "aux_loss_scope"):
            check(name, getattr(self, name) not in RENAMED_SCOPES, "renamed: use 'sequence'")
            require_choice(f"model.{name}", getattr(self, name), SCOPES)
        without = f"must be {SCOPES[0]} with model"
        fits = self.capacity_factor is not None or self.capacity_scope == SCOPES[0]
        check("capacity_scope", fits, f"{without}.capacity_factor=null: nothing is dropped")
        fits = self.aux_loss_coefficient > 0 or self.aux_loss_scope == SCOPES[0]
        check("aux_loss_scope", fits, f"{without}.aux_loss_coefficient=0: there is no such loss")

    @property
    def attentions(self) -> list[AttentionKind]:
        """Kind of attention of every layer."""
        kinds = [ATTENTIONS[letter] for letter in self.layer_pattern]
        return kinds * (self.num_layers // len(kinds))

    @property
    def alpha(self) -> float:
        """``residual_scale``, or DeepNorm's for this depth."""
        return deep_norm_alpha(self.num_layers) if self.residual_scale is None else self.residual_scale

    def expert_capacity(self, tokens: int) -> int:
        """Assignments an expert takes of that many tokens; call it only with a capacity factor."""
        assert self.capacity_factor is not None
        share = self.capacity_factor * self.experts_per_token * tokens / self.num_experts
        return int(share * (1 + 1e-9))  # 0.29 * 100 is 29

    @property
    def initial_gain(self) -> float:
        """DeepNorm's beta, ``(8 N)^(-1/4)``: Xavier gain of value, output and expert projections."""
        return (8 * self.num_layers) ** -0.25


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model: all of them, and those that one token passes through.

    ``active`` includes embedding and head; ``active_in_layers`` leaves them out, as the MiniMax-01 report does.
    """

    total: int
    active: int
    active_in_layers: int


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Parameters from the sizes alone, norms included."""
    D = config.hidden_size
    expert = 3 * D * config.expert_hidden_size
    vocabulary, shared = 2 * config.vocab_size * D, D
    for kind in config.attentions:
        shared += kind.parameters(config) + 2 * D + config.num_experts * D
    active_in_layers = shared + config.num_layers * config.experts_per_token * expert
    return ParameterCount(
        total=vocabulary + shared + config.num_layers * config.num_experts * expert,
        active=vocabulary + active_in_layers,
        active_in_layers=active_in_layers,
    )
