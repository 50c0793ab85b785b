"""Tensor parallelism: what moves at the edges of the parts of a model whose heads or vocabulary ranks share.

Outside those parts a rank holds 1/n of the tokens (sequence parallelism, arXiv 2205.05198), so that norms, residuals
and experts are nowhere computed twice. Every function is differentiable, and its gradient is its mirror image.

Shape legend: t tokens on this rank, T = n t tokens of the group, D hidden, C any number.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimax_train.parallel.communicator import Communicator


def gather_tokens(x_tD: Tensor, communicator: Communicator) -> Tensor:
    """``[t, D] -> [T, D]``: all ranks' tokens in rank order. Backward: :func:`scatter_sum`."""
    return _Move.apply(x_tD, communicator, _gathered, _scattered)


def scatter_sum(y_TD: Tensor, communicator: Communicator) -> Tensor:
    """``[T, D] -> [t, D]``: the sum over ranks, of this rank's tokens. Backward: :func:`gather_tokens`."""
    return _Move.apply(y_TD, communicator, _scattered, _gathered)


def sum_over(x: Tensor, communicator: Communicator) -> Tensor:
    """The sum over ranks, on every rank. Backward: the same sum, of the gradients."""
    return _Move.apply(x, communicator, _summed, _summed)


def merge_log_sums(log_sum_C: Tensor, communicator: Communicator) -> Tensor:
    """``log sum exp`` over ranks, on every rank; not differentiable."""
    return communicator.all_gather(log_sum_C).wait().logsumexp(0)


def _gathered(x_tD: Tensor, communicator: Communicator) -> Tensor:
    return communicator.all_gather(x_tD).wait().flatten(0, 1)


def _scattered(y_TD: Tensor, communicator: Communicator) -> Tensor:
    return communicator.reduce_scatter(y_TD.unflatten(0, (communicator.size, -1))).wait()


def _summed(x: Tensor, communicator: Communicator) -> Tensor:
    return communicator.all_gather(x).wait().sum(0)


class _Move(torch.autograd.Function):
    """``move`` forward and its mirror image backward."""

    @staticmethod
    def forward(ctx, x, communicator, move, mirror):
        ctx.communicator, ctx.mirror = communicator, mirror
        return move(x, communicator)

    @staticmethod
    @once_differentiable
    def backward(ctx, d):
        return ctx.mirror(d, ctx.communicator), None, None, None
