"""Weight gradients apart from the backward pass, for pipeline schedules that split it (zero bubble, arXiv 2401.10241).

Inside ``with deferred() as pending:`` the backward pass of an autograd function that multiplies by weights makes the
gradients of its inputs alone, and puts a computation of its weights' gradients on ``pending``. :func:`run` runs these
computations and hands what they return to autograd, which adds it to the gradients of the parameters as it would have
in the backward pass. Outside, functions differentiate as ever. Megatron-Core's ``delay_wgrad_compute`` is alike.

    forward     function.apply(x, *defer(x, *weights))
    backward    gradients_of(weights, compute) in place of the weights' gradients

Until it runs, a computation holds what it needs: of a projection its inputs and the gradient of its outputs.

Shape legend: T tokens, D columns in, W columns out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Compute = Callable[[], tuple[Tensor | None, ...]]
"""Makes the gradients of some weights; None for those that it has added to an accumulator (``accumulation.py``)."""


class Deferred(NamedTuple):
    """A computation, and the weights whose gradients it makes, as they hang on their parameters."""

    weights: tuple[Tensor, ...]
    compute: Compute


Pending = deque[Deferred | int]
"""What a backward pass left, in its order: computations, and after those of a layer its number."""

_pending: Pending | None = None


@contextmanager
def deferred() -> Iterator[Pending]:
    """Around a forward pass, and around its backward pass, which fills what this yields. Not to be nested."""
    global _pending
    assert _pending is None
    _pending = deque()
    try:
        yield _pending
    finally:
        _pending = None


def run(pending: Pending, layer_done: Callable[[int], None] | None = None) -> None:
    """Compute the gradients, in the order of the backward pass, and add them to those of the parameters. What each
    computation held is freed when it is done.

    Args:
        layer_done: told after the last computation of a layer its number.
    """
    while pending:
        if isinstance(item := pending.popleft(), int):
            if layer_done is not None:
                layer_done(item)
            continue
        (weights, compute), item = item, None
        with torch.enable_grad():
            root = _Gradients.apply(compute, *weights)
        del compute
        torch.autograd.backward(root, root.detach())


class _Gradients(torch.autograd.Function):
    """A backward pass of weights alone. What goes forward, and its gradient, mean nothing."""

    @staticmethod
    def forward(ctx, compute, *weights):
        ctx.compute = compute
        return weights[0].new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        compute, ctx.compute = ctx.compute, None
        return None, *compute()


def begin_layer(x: Tensor, layer: int) -> Tensor:
    """What goes into a layer, for :func:`run` to tell when its gradients of weights are there."""
    return x if _pending is None or not x.requires_grad else _BeginLayer.apply(x, layer)


class _BeginLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        assert _pending is not None
        _pending.append(ctx.layer)
        return dx, None


class Weights:
    """Weights whose gradients are deferred."""

    def __init__(self, weights: tuple[Tensor, ...]) -> None:
        self._weights = weights

    def put_off(self, compute: Compute) -> tuple[None, ...]:
        assert _pending is not None, "a forward pass inside deferred(), its backward pass outside"
        _pending.append(Deferred(self._weights, compute))
        return (None,) * len(self._weights)


def defer(x: Tensor, *weights: Tensor) -> tuple[Weights | None, *tuple[Tensor, ...]]:
    """None and the weights; or, where their gradients are to be deferred, the weights, and them cut off from autograd.

    Args:
        x: what they are multiplied with. Where it has no gradient there is no backward pass to put anything off.
    """
    if _pending is None or not x.requires_grad or not torch.is_grad_enabled():
        return None, *weights
    return Weights(weights), *(weight.detach() for weight in weights)


def gradients_of(weights: Weights | None, compute: Compute) -> tuple[Tensor | None, ...]:
    """For a backward pass to return: the gradients, or None for each of the weights that put it off."""
    return compute() if weights is None else weights.put_off(compute)


def linear(x_TD: Tensor, weight_WD: Tensor) -> Tensor:
    """``x @ weight^T``, its weight gradient deferred where that is asked for."""
    if _pending is None:
        return F.linear(x_TD, weight_WD)
    return _Linear.apply(x_TD, *defer(x_TD, weight_WD))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weights, weight_WD):
        ctx.save_for_backward(x_TD, weight_WD)
        ctx.weights = weights
        return F.linear(x_TD, weight_WD)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TW):
        x_TD, weight_WD = ctx.saved_tensors
        return dy_TW @ weight_WD, None, *gradients_of(ctx.weights, lambda: (dy_TW.t() @ x_TD,))
