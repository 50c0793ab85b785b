"""Gradients of weights that GEMMs add up where an engine keeps them, in its dtype.

Autograd would have a tensor of the weights' dtype made, rounded, written, read and added; here the GEMM itself adds
what it made to the engine's sum (Megatron-LM's gradient accumulation fusion).

    engine      gives a parameter an :class:`Accumulator`: ``set_accumulator``
    forward     ``find_accumulators(weights)``, all or none; to be kept for the backward pass
    backward    ``add_gradient(accumulator, shape, make)``, whose None autograd takes for no gradient; at its end
                ``accumulator.added()``

Hooks of the parameter find no gradient, and ``torch.autograd.grad`` has none to return.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

Make = Callable[[Tensor | None, bool], Tensor | None]
"""``(out, adds)``: computes a gradient, and writes it to a tensor or adds it there. Returns it, a new one for None."""


class Accumulator(Protocol):
    """Where an engine adds up the gradients of one parameter. The parameter refers to it, so it should not itself refer
    to the engine, which would then live as long."""

    def sum(self) -> tuple[Tensor, bool]:
        """Where the gradient is added up, of the parameter's shape and contiguous; and whether there is a sum yet, or
        whatever is there is to be overwritten."""
        ...

    def added(self) -> None:
        """To be called when a backward pass has added its gradient; once in a pass, for the engine may then have it
        summed over ranks."""
        ...


def set_accumulator(parameter: Tensor, accumulator: Accumulator) -> None:
    """From now on gradients of the parameter may go there."""
    parameter._accumulator = accumulator  # type: ignore[attr-defined]


def find_accumulators(weights: Sequence[Tensor]) -> list[Accumulator] | None:
    """Those of parameters, or of views of them that have all their elements in order; None unless all have one."""
    found = [_find(weight) for weight in weights]
    return None if None in found else found  # type: ignore[return-value]


def _find(weight: Tensor) -> Accumulator | None:
    parameter = weight if weight._base is None else weight._base
    # All elements of a contiguous tensor, contiguous too, are in its order.
    is_whole = weight.is_contiguous() and parameter.is_contiguous() and weight.numel() == parameter.numel()
    return getattr(parameter, "_accumulator", None) if is_whole and weight.requires_grad else None


def add_gradient(accumulator: Accumulator | None, shape: torch.Size, make: Make) -> Tensor | None:
    """The gradient of a weight of that shape; None where it is in the accumulator, which is to be told."""
    if accumulator is None:
        return make(None, False)
    total, adds = accumulator.sum()
    make(total.view(shape), adds)
    return None
