"""Memory of one micro-batch's activations on a rank, and what each layer computes again rather than keep.

Per token of the rank between the attentions (``tokens``: those of the micro-batch over cp x tp) a block keeps, in
numbers of the dtype of compute, with D the hidden size and K experts per token of hidden size F:

    x, and what attention returned                2 D
    inside the attention                          ``Activations.kept`` of its kind
    gate and up of the experts                    2 K F
    -----------------------------------------------------------------------------
    and with ``none`` also what is cheap:
    both norms' outputs                           2 D
    inside the attention                          ``Activations.cheap``; with ``selective`` too where the host calls
                                                  the attention between CUDA graphs, for what it reads is kept

``selective`` keeps what is above the line, ``full`` x alone. Tensor parallelism changes none of it: inside an attention
a rank has tp times the tokens and a tp-th of the heads. With experts on other ranks the tokens that arrive here are
kept too, whatever the choice but ``full``; how many is taken as routing in balance has it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from minimax_train.kernels.cross_entropy import choose_block
from minimax_train.model.attention.kind import AttentionKind
from minimax_train.model.config import ModelConfig

RECOMPUTATIONS = ("none", "selective", "full")
"""What the backward pass computes again, from nothing to all of a block; each keeps less than the one before."""

MARGIN = 0.06
"""Of the free memory, left for what no formula counts: fragmentation, buffers of communication, workspaces of GEMMs,
lightning attention's states where its kernels split the tokens."""

_FLOAT32 = 4
_PERMUTATION = 2 * 8  # an assignment's place and its inverse, which the dispatcher holds in every choice


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes that one micro-batch takes on one rank besides parameters, their gradients and the optimizer's states.

    Attributes:
        model: its sizes.
        itemsize: bytes of a number in the dtype of compute.
        tp, ep, etp: sizes of these axes of the process grid.
        held: of how many micro-batches the rank holds each layer's activations at a time, 0 of a layer that is on
            another pipeline stage; None for one of every layer.
        attention_is_called: whether the host calls the attention between CUDA graphs; without any layer that is
            ``full``, beside which there are none.
        deferred: under a schedule that makes gradients of weights later, when most of them wait: of how many
            micro-batches the rank holds each layer's activations, and of how many what those gradients are made of.
    """

    model: ModelConfig
    itemsize: int = 2
    tp: int = 1
    ep: int = 1
    etp: int = 1
    attention_is_called: bool = False
    held: Sequence[int] | None = None
    deferred: Sequence[tuple[int, int]] = ()

    @property
    def held_layers(self) -> dict[int, int]:
        """``held`` by layer on this rank."""
        held = [1] * self.model.num_layers if self.held is None else self.held
        return {layer: number for layer, number in enumerate(held) if number}

    def kept(self, tokens: int, recomputation: Sequence[str]) -> int:
        """Held by all blocks between the forward and the backward pass, for that many tokens of the rank.

        Args:
            recomputation: of each layer.
        """
        held, called = self.held_layers.items(), self._is_called(recomputation)
        return sum(number * self._block(layer, tokens, recomputation[layer], called) for layer, number in held)

    def peak(self, tokens: int, recomputation: Sequence[str]) -> int:
        """The most at any time: when the loss is computed, or in the backward pass of a block, which has all it keeps
        or computes again, beside what the blocks before it keep, and all of other micro-batches; or when most gradients
        of weights wait."""
        others = before = backward = 0
        attentions, found = self.model.attentions, dict[tuple[AttentionKind, str], tuple[int, int]]()
        called = self._is_called(recomputation)
        for layer, number in self.held_layers.items():
            alike = attentions[layer], recomputation[layer]
            if alike not in found:
                most = self._block(layer, tokens, "none") + self._gradients(layer, tokens)
                found[alike] = self._block(layer, tokens, recomputation[layer], called), most
            kept, most = found[alike]
            backward = max(backward, before + most)
            before += kept
            others += (number - 1) * kept
        waiting = sum(
            activations * self._block(layer, tokens, recomputation[layer]) + operands * self._operands(layer, tokens)
            for layer, (activations, operands) in enumerate(self.deferred)
            if activations or operands
        )
        return self._head(tokens) + max(others + max(before + self._loss(tokens), backward), waiting)

    def forward(self, tokens: int) -> int:
        """The most at any time of a forward pass alone, as an evaluation makes it."""
        block = max(self._block(i, tokens, "none") for i in self.held_layers)
        return max(block, self._loss(tokens)) + 2 * tokens * self.model.hidden_size * self.itemsize

    def _is_called(self, recomputation: Sequence[str]) -> bool:
        return self.attention_is_called and "full" not in recomputation

    def _block(self, layer: int, tokens: int, recomputation: str, called: bool = False) -> int:
        model = self.model
        D, K = model.hidden_size, model.experts_per_token
        if recomputation == "full":
            return tokens * (D * self.itemsize + _PERMUTATION * K)
        attention = model.attentions[layer].activations(model)
        numbers = 2 * D + attention.kept + 2 * K * model.expert_hidden_size
        numbers += self._dispatched * D
        if recomputation == "none":
            numbers += 2 * D + attention.cheap
        elif called:
            numbers += attention.cheap
        # Probabilities; each assignment's expert, and its weight twice.
        router = _FLOAT32 * model.num_experts + K * (8 + 2 * _FLOAT32)
        scalars = _FLOAT32 * (2 + attention.float32)
        return tokens * (numbers * self.itemsize + _PERMUTATION * K + router + scalars)

    def _operands(self, layer: int, tokens: int) -> int:
        """What gradients of weights are made of: of both projections the inputs and gradients of outputs, with tensor
        parallelism those of all its ranks' tokens where D wide; of the experts also the activation."""
        model, D, K = self.model, self.model.hidden_size, self.model.experts_per_token
        attention = 2 * self.tp * D + model.attentions[layer].activations(model).kept
        experts = 2 * max(1, self._dispatched) * D + 3 * K * model.expert_hidden_size
        return tokens * ((attention + experts) * self.itemsize + _PERMUTATION * K)

    @property
    def _dispatched(self) -> int:
        """Tokens that arrive at this rank's experts and are kept, for each token of the rank."""
        if self.ep == self.etp == 1:
            return 0
        return self.etp * (self.model.experts_per_token if self.ep > 1 else 1)

    def _gradients(self, layer: int, tokens: int) -> int:
        """Of a block's backward pass at its peak: of attention's activations, or of those between the experts' GEMMs,
        and of the residual stream and the half's output. With ep and etp the experts' tokens are there as they arrived
        over either, by expert, and on their way back."""
        model = self.model
        D, attention = model.hidden_size, model.attentions[layer].activations(model)
        copies = 5 * self.etp if self.ep > 1 and self.etp > 1 else 2
        experts = model.experts_per_token * (3 * model.expert_hidden_size + copies * D)
        return tokens * self.itemsize * (2 * D + max(attention.kept + attention.cheap, experts))

    def _head(self, tokens: int) -> int:
        """The input of the last norm and what the loss hands to the backward pass: gradients of x and the weight."""
        D, V = self.model.hidden_size, self.model.vocab_size // self.tp
        _, wide = self._blocks(tokens)
        return D * (tokens * (1 + self.tp) * self.itemsize + V * (_FLOAT32 if wide else self.itemsize))

    def _loss(self, tokens: int) -> int:
        """A block of logits, and x of all tokens."""
        block, _ = self._blocks(tokens)
        return self.itemsize * (block * (self.model.vocab_size // self.tp) + tokens * self.tp * self.model.hidden_size)

    def _blocks(self, tokens: int) -> tuple[int, bool]:
        D, V = self.model.hidden_size, self.model.vocab_size // self.tp
        return choose_block(tokens * self.tp, D, V, itemsize=self.itemsize, temporaries=0)


def choose_recomputation(memory: ActivationMemory, tokens: int, free_bytes: int) -> tuple[str, ...]:
    """The fastest that fits of what each layer may compute again (:data:`RECOMPUTATIONS`): one whose peak is within the
    free memory less :data:`MARGIN` of it; ``full`` everywhere if none is.

    As few layers as possible recompute: all keep everything, then one after the other becomes ``selective``, then
    ``full``. The first are those whose attention memory bandwidth limits (``AttentionCost.moved``), which are cheap to
    compute again, and of these the lowest: their backward pass comes last, when the others' activations are gone.

    Args:
        tokens: of a micro-batch on one rank, between the attentions: those of its packed sequences over cp x tp.
        free_bytes: what the device has left beside parameters, gradients and states; on several ranks the least.
    """
    model, layers = memory.model, memory.model.num_layers
    attentions = model.attentions
    order = sorted(range(layers), key=lambda layer: (attentions[layer].cost(model).moved == 0, layer))

    def after(steps: int) -> tuple[str, ...]:
        level, changed = divmod(steps, layers)
        recomputation = [RECOMPUTATIONS[level]] * layers
        for layer in order[:changed]:
            recomputation[layer] = RECOMPUTATIONS[level + 1]
        return tuple(recomputation)

    def fits(steps: int) -> bool:
        return memory.peak(tokens, after(steps)) <= (1 - MARGIN) * free_bytes

    return after(bisect_left(range(2 * layers), True, key=fits))


def recomputation_shown(recomputation: Sequence[str]) -> str:
    """``"selective"``, or ``"full in 3 layers, selective in 21"``."""
    counts = Counter(recomputation)
    if len(counts) == 1:
        return recomputation[0]
    first, *rest = [(choice, counts[choice]) for choice in reversed(RECOMPUTATIONS) if counts[choice]]
    return ", ".join([f"{first[0]} in {first[1]} layers", *(f"{choice} in {count}" for choice, count in rest)])
