"""What the rest of the framework knows of an attention: nothing else asks which kind one is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

if TYPE_CHECKING:
    from minimax_train.model.config import ModelConfig


@dataclass(frozen=True)
class HuggingFaceNames:
    """The same attention in transformers' MiniMax.

    Attributes:
        layer_type: its name in ``layer_types``.
        parameters: ours to theirs, each within its attention module.
        rotated: ours whose output rows carry rotary position embedding, one head after the other.
        has_decays: whether transformers keeps the decays of ``convert/decays.py`` beside the parameters.
    """

    layer_type: str
    parameters: Mapping[str, str]
    rotated: tuple[str, ...] = ()
    has_decays: bool = False


class Activations(NamedTuple):
    """What an attention's forward pass leaves for its backward pass, for each token.

    Attributes:
        kept: numbers in the dtype of compute that are kept unless the whole block is computed again.
        cheap: those of what selective recomputation computes again; its input is not among them.
        float32: numbers in float32.
    """

    kept: int
    cheap: int
    float32: int


class AttentionCost(NamedTuple):
    """What the planner (``planner/cost.py``) takes a layer to cost besides its projections; of all heads.

    Attributes:
        moved: numbers in the dtype of compute that the forward and backward pass read and write for each token, where
            memory bandwidth decides how long they take; 0 where FLOPs do.
        exchanged: such numbers that a context-parallel rank receives of each other rank in the forward pass, given its
            own tokens and the packed sequences of its micro-batch.
    """

    moved: int
    exchanged: Callable[[int, int], int]


@dataclass(frozen=True, eq=False)
class AttentionKind:
    """One kind of attention.

    Attributes:
        letter: names it in ``model.layer_pattern``.
        name: names it in messages.
        module: built as ``module(config, layer, kernels, ranks)`` and called as ``attention(x_tD, context) -> y_tD``,
            with ``initializers()`` and ``shardings()`` for its parameters. It computes with the parameters that are on
            this rank, and with the tokens of ``context``.
        parameters: how many a layer has, from the sizes alone.
        flops: of a layer's forward pass for one token, a multiply-add being two, norms and activations left out; from
            the sizes and the mean number of tokens that a token sees in a causal attention, itself included: in
            documents of n tokens ``(n + 1) / 2``.
        activations: from the sizes alone, of all heads; their input and what they return left out.
        cost: from the sizes alone.
        tp: the keys of ``model`` whose values tensor parallelism splits, and ``parallel.tp`` must divide; None where
            the attention cannot be split over ranks.
        cp: the keys of ``parallel`` that choose how context parallelism is done, with what each may be besides
            ``auto``; empty where there is one way, None where a packed sequence cannot be split over ranks.
        hugging_face: None where transformers has no such attention.
    """

    letter: str
    name: str
    module: Callable[..., nn.Module]
    parameters: Callable[[ModelConfig], int]
    flops: Callable[[ModelConfig, float], float]
    activations: Callable[[ModelConfig], Activations]
    cost: Callable[[ModelConfig], AttentionCost]
    tp: tuple[str, ...] | None = None
    cp: Mapping[str, tuple[str, ...]] | None = None
    hugging_face: HuggingFaceNames | None = None

    def __str__(self) -> str:
        return f"{self.letter} ({self.name})"
