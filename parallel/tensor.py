"""Tensor parallelism: what moves at the edges of the parts of a model whose heads or vocabulary ranks share.

Outside those parts a rank holds 1/n of the tokens (sequence parallelism, arXiv 2205.05198), so that norms, residuals
and experts are nowhere computed twice. Every move is differentiable, and its gradient is its mirror image.

Shape legend: t tokens on this rank, T = n t tokens of the group, D hidden, W the part of a projection's width that
this rank has, C any number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimax_train.kernels.cross_entropy import VocabularyShard
from minimax_train.kernels.deferral import defer, gradients_of, linear
from minimax_train.parallel.communicator import Communicator


class TensorParallel:
    """The ranks that share heads and vocabulary, and what moves between them; one rank holds all, and nothing moves.

    Args:
        communicator: the ranks; None for this one alone.
    """

    def __init__(self, communicator: Communicator | None = None) -> None:
        self.rank, self.size = (0, 1) if communicator is None else (communicator.rank, communicator.size)
        self._communicator = communicator if self.size > 1 else None

    def local_range(self, size: int) -> range:
        """This rank's heads, or vocabulary entries, of ``size`` that the ranks share equally."""
        part = size // self.size
        return range(self.rank * part, (self.rank + 1) * part)

    def gather(self, x_tD: Tensor) -> Tensor:
        """``[t, D] -> [T, D]``: all ranks' tokens in rank order. Backward: :meth:`scatter_sum`."""
        return self._move(x_tD, _gathered, _scattered)

    def scatter_sum(self, y_TD: Tensor) -> Tensor:
        """``[T, D] -> [t, D]``: the sum over ranks, of this rank's tokens. Backward: :meth:`gather`."""
        return self._move(y_TD, _scattered, _gathered)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks, on every rank. Backward: the same sum, of the gradients."""
        return self._move(x, _summed, _summed)

    def project(self, x_tD: Tensor, *weights_WD: Tensor) -> tuple[Tensor, ...]:
        """``[t, D] -> [T, W]`` of each weight: all ranks' tokens in rank order, times ``[D, W]``.

        This rank's tokens are multiplied while the others' arrive. What is kept for backward is ``[t, D]``: the tokens
        are gathered again, beside the GEMM for their gradient, whose sum over ranks then travels beside the GEMMs for
        the weights' (arXiv 2205.05198, section 4.2.2).

        Args:
            weights_WD: one or more, the dtype of x.
        """
        return _GatherProject.apply(x_tD, self._communicator, *defer(x_tD, *weights_WD))

    def project_sum(self, x_TW: Tensor, weight_DW: Tensor) -> Tensor:
        """``[T, W] -> [t, D]``: times ``[W, D]``, summed over ranks, of this rank's tokens.

        In the backward pass the gradients of this rank's tokens are multiplied while the others' arrive.

        Args:
            weight_DW: this rank's columns, the dtype of x.
        """
        if self._communicator is None:
            return linear(x_TW, weight_DW)
        return _ProjectSum.apply(x_TW, self._communicator, *defer(x_TW, weight_DW))

    def vocabulary(self, size: int) -> VocabularyShard | None:
        """This rank's part of a vocabulary, None where that is all of it."""
        if self._communicator is None:
            return None
        merge = partial(_merged_log_sums, communicator=self._communicator)
        return VocabularyShard(self.local_range(size).start, self.size, merge)

    def _move(self, x: Tensor, move: Callable, mirror: Callable) -> Tensor:
        return x if self._communicator is None else _Move.apply(x, self._communicator, move, mirror)


def _gathered(x_tD: Tensor, communicator: Communicator) -> Tensor:
    return communicator.all_gather(x_tD).wait().flatten(0, 1)


def _scattered(y_TD: Tensor, communicator: Communicator) -> Tensor:
    return communicator.reduce_scatter(y_TD.unflatten(0, (communicator.size, -1))).wait()


def _summed(x: Tensor, communicator: Communicator) -> Tensor:
    return communicator.all_gather(x).wait().sum(0)


def _merged_log_sums(log_sum_C: Tensor, communicator: Communicator) -> Tensor:
    return communicator.all_gather(log_sum_C).wait().logsumexp(0)


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


def _times_gathered(x_tD: Tensor, weights_DW: Sequence[Tensor], communicator: Communicator) -> list[Tensor]:
    """All ranks' tokens, and their products with each weight: first this rank's, while the others are gathered."""
    gathering, t = communicator.all_gather(x_tD), len(x_tD)
    start, end = communicator.rank * t, (communicator.rank + 1) * t
    outputs_TW = [x_tD.new_empty(communicator.size * t, weight_DW.shape[1]) for weight_DW in weights_DW]
    pairs = list(zip(weights_DW, outputs_TW, strict=True))
    for weight_DW, out_TW in pairs:
        torch.mm(x_tD, weight_DW, out=out_TW[start:end])
    x_TD = gathering.wait().flatten(0, 1)
    for rows in (slice(0, start), slice(end, None)):
        for weight_DW, out_TW in pairs:
            if len(out_TW[rows]):
                torch.mm(x_TD[rows], weight_DW, out=out_TW[rows])
    return [x_TD, *outputs_TW]


class _GatherProject(torch.autograd.Function):
    """The gradient of x is summed over the weights in the GEMMs that make it."""

    @staticmethod
    def forward(ctx, x_tD, communicator, deferral, *weights_WD):
        ctx.save_for_backward(x_tD, *weights_WD)
        ctx.communicator, ctx.deferral = communicator, deferral
        if communicator is None:
            return tuple(F.linear(x_tD, weight_WD) for weight_WD in weights_WD)
        return tuple(_times_gathered(x_tD, [weight_WD.t() for weight_WD in weights_WD], communicator)[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients_TW):
        x_tD, *weights_WD = ctx.saved_tensors
        communicator = ctx.communicator
        gathering = None if communicator is None else communicator.all_gather(x_tD)
        dx_TD = gradients_TW[0] @ weights_WD[0]
        for d_TW, weight_WD in zip(gradients_TW[1:], weights_WD[1:], strict=True):
            dx_TD.addmm_(d_TW, weight_WD)

        def d_weights() -> tuple[Tensor, ...]:
            x_TD = x_tD if gathering is None else gathering.wait().flatten(0, 1)
            return tuple(d_TW.t() @ x_TD for d_TW in gradients_TW)

        if communicator is None:
            return dx_TD, None, None, *gradients_of(ctx.deferral, d_weights)
        scattering = communicator.reduce_scatter(dx_TD.unflatten(0, (communicator.size, -1)))
        d_weights_WD = gradients_of(ctx.deferral, d_weights)
        return scattering.wait(), None, None, *d_weights_WD


class _ProjectSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TW, communicator, deferral, weight_DW):
        ctx.save_for_backward(x_TW, weight_DW)
        ctx.communicator, ctx.deferral = communicator, deferral
        return _scattered(F.linear(x_TW, weight_DW), communicator)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_tD):
        x_TW, weight_DW = ctx.saved_tensors
        dy_TD, dx_TW = _times_gathered(dy_tD, [weight_DW], ctx.communicator)
        return dx_TW, None, None, *gradients_of(ctx.deferral, lambda: (dy_TD.t() @ x_TW,))
