"""Gradients of weights that GEMMs add up where an engine keeps them, in its dtype.

Autograd would have a tensor of the weights' dtype made, rounded, written, read and added; here the GEMM itself adds
what it made to the engine's sum (Megatron-LM's gradient accumulation fusion).

    engine      holds an :class:`Accumulator` for a parameter, and tells the parameter: ``set_accumulator``
    forward     ``find_accumulators(weights)``, all or none; to be kept for the backward pass
    backward    ``add_gradient(accumulator, weight, make)``, whose None autograd takes for no gradient; at its end
                ``accumulator.added()``

Nothing else adds to these gradients in the same backward pass. Hooks of the parameter find no gradient.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

Make = Callable[[Tensor | None, bool], Tensor | None]
"""``(out, adds)``: computes a gradient, and writes it to a tensor or adds it there. Returns it, a new one for None."""


class Accumulator(Protocol):
    """Of one parameter, in an engine, which refers to it as long as it lives."""

    def sum(self) -> tuple[Tensor, bool]:
        """Where the gradient is added up, of the parameter's shape and contiguous; and whether there is a sum yet, or
        whatever is there is to be overwritten."""
        ...

    def added(self) -> None:
        """What a backward pass makes is in it."""
        ...


def set_accumulator(parameter: Tensor, accumulator: Accumulator) -> None:
    """Until the accumulator is let go of, gradients of the parameter may go there."""
    parameter._accumulator = weakref.ref(accumulator)  # type: ignore[attr-defined]


def find_accumulators(weights: Sequence[Tensor]) -> list[Accumulator] | None:
    """Those of parameters, or of views of them that have all their elements in order; None unless all have one."""
    found = [_find(weight) for weight in weights]
    return None if None in found else found  # type: ignore[return-value]


def _find(weight: Tensor) -> Accumulator | None:
    parameter = weight if weight._base is None else weight._base
    reference = getattr(parameter, "_accumulator", None)
    if reference is None or not weight.requires_grad:
        return None
    whole = weight.is_contiguous() and weight.numel() == parameter.numel()
    return reference() if whole and weight.storage_offset() == parameter.storage_offset() else None


def add_gradient(accumulator: Accumulator | None, weight: Tensor, make: Make) -> Tensor | None:
    """The gradient of a weight; None where it is in the accumulator, which is to be told."""
    if accumulator is None:
        return make(None, False)
    total, adds = accumulator.sum()
    make(total.view(weight.shape), adds)
    return None
