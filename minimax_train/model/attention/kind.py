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
    """The same attention in transformers' MiniMax and in the original MiniMax-Text-01.

    Attributes:
        layer_type: its name in ``layer_types`` of transformers.
        attn_type: its number in ``attn_type_list`` of MiniMax-Text-01.
        parameters: ours to theirs, each within its attention module.
        rotated: ours whose output rows carry rotary position embedding, one head after the other.
        has_decays: whether transformers keeps the decays of ``convert/decays.py`` beside the parameters.
    """

    layer_type: str
    attn_type: int
    parameters: Mapping[str, str]
    rotated: tuple[str, ...] = ()
    has_decays: bool = False


class Activations(NamedTuple):
    """What an attention's forward pass leaves for its backward pass, for each token, with the implementation that
    ``auto`` takes on a GPU.

    Attributes:
        kept: numbers in the dtype of compute that are kept unless the whole block is computed again.
        cheap: such numbers that are kept with ``recipe.activation_checkpointing=none`` alone: what functions return
            that the module runs through :func:`minimax_train.model.recompute.cheap`.
        float32: numbers in float32, kept like the first.
    """

    kept: int
    cheap: int
    float32: int


class AttentionCost(NamedTuple):
    """What the planner (``planner/cost.py``) takes a layer to cost besides its projections; of all heads.

    Attributes:
        moved: numbers in the dtype of compute that the forward and backward pass read and write for each token, if
            memory bandwidth decides how long the attention takes; 0 if its FLOPs do. Of layers that recompute, those
            with 0 are the last that ``recipe.activation_checkpointing=auto`` chooses (``model/memory.py``).
        exchanged: such numbers that a context-parallel rank receives from each other rank in the forward pass, given
            its own tokens and the packed sequences of its micro-batch. Not asked for where ``AttentionKind.cp`` is
            None.
    """

    moved: int
    exchanged: Callable[[int, int], int] = lambda tokens, sequences: 0


@dataclass(frozen=True, eq=False)
class AttentionKind:
    """One kind of attention.

    Attributes:
        letter: names it in ``model.layer_pattern``.
        name: names it in messages.
        module: built as ``module(config, layer, kernels, ranks)`` and called as ``attention(x_tD, context) -> y_tD``,
            with ``initializers()`` and ``shardings()`` for its parameters. It computes with the parameters that are on
            this rank (:func:`minimax_train.model.sharding.local`). ``x_tD`` and ``y_tD`` have this rank's tokens,
            ``context`` describes those of all ranks of tp, as ``ranks.tp.project`` returns them.
        parameters: how many a layer has, from the sizes alone.
        flops: of a layer's forward pass for one token, a multiply-add being two, norms and activations left out; from
            the sizes and the mean number of tokens that a token sees in a causal attention, itself included: in
            documents of n tokens ``(n + 1) / 2``. Of documents of several lengths only this mean is known.
        activations: from the sizes alone, of all heads; the module's input and output are counted with the block.
        cost: from the sizes alone.
        fields: the kind's own keys of ``model``: they must be given if the model has the kind, and be null if it has
            no kind that names them.
        tp: the keys of ``model`` whose values tensor parallelism splits, and ``parallel.tp`` must divide; None where
            the attention cannot be split over ranks.
        cp: the keys of ``parallel`` that choose how context parallelism is done, with what each may be besides
            ``auto``; empty where there is one way, None where a packed sequence cannot be split over ranks.
        hugging_face: None where MiniMax on Hugging Face has no such attention: the model cannot be exported.
    """

    letter: str
    name: str
    module: Callable[..., nn.Module]
    parameters: Callable[[ModelConfig], int]
    flops: Callable[[ModelConfig, float], float]
    activations: Callable[[ModelConfig], Activations]
    cost: Callable[[ModelConfig], AttentionCost]
    fields: tuple[str, ...] = ()
    tp: tuple[str, ...] | None = None
    cp: Mapping[str, tuple[str, ...]] | None = None
    hugging_face: HuggingFaceNames | None = None

    def __str__(self) -> str:
        return f"{self.letter} ({self.name})"
