"""RMSNorm (arXiv 1910.07467), alone, after the DeepNorm residual, and before lightning attention's output gate.

Statistics are float32 (float64 for float64 inputs), the output has the dtype of x.

Shape legend: T tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimax_train.kernels.dispatch import AUTO, OnDemand, choose, triton_or_torch
from minimax_train.kernels.norm import naive, pytorch

__all__ = [
    "IMPLEMENTATIONS",
    "add_rms_norm",
    "gated_rms_norm",
    "gated_scale",
    "rms_norm",
    "rms_norm_twice",
    "sum_of_squares",
]


@OnDemand
def _triton():
    from minimax_train.kernels.norm import triton

    return triton


@OnDemand
def _apex():
    from minimax_train.kernels.norm import apex

    return apex


IMPLEMENTATIONS = {"triton": _triton, "torch": pytorch, "apex": _apex, "naive": naive}


def _choose(x_TD: Tensor, requested: str) -> Any:
    return choose("norm", IMPLEMENTATIONS, requested, triton_or_torch(x_TD))


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float, *, implementation: str = AUTO) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` of each row.

    Args:
        implementation: ``auto``, ``triton`` (not float64), ``torch``, ``apex`` or ``naive``.
    """
    return _choose(x_TD, implementation).rms_norm(x_TD, weight_D, eps)


def rms_norm_twice(x_TD: Tensor, weight_D: Tensor, eps: float, *, implementation: str = AUTO) -> tuple[Tensor, Tensor]:
    """:func:`rms_norm`, in one tensor that is returned twice: for two readers, whose gradients the backward pass of
    ``triton`` adds as it reads them."""
    return _choose(x_TD, implementation).rms_norm_twice(x_TD, weight_D, eps)


def add_rms_norm(
    h_TD: Tensor, f_TD: Tensor, weight_D: Tensor, *, alpha: float, eps: float, implementation: str = AUTO
) -> Tensor:
    """``rms_norm(alpha * h + f)``: the residual of one half of a block and the norm of the next (arXiv 2203.00555)."""
    return _choose(h_TD, implementation).add_rms_norm(h_TD, f_TD, weight_D, alpha, eps)


def gated_rms_norm(
    x_TD: Tensor, gate_TD: Tensor, weight_D: Tensor, *, eps: float, implementation: str = AUTO
) -> Tensor:
    """``rms_norm(x) * sigmoid(gate)``: the end of lightning attention before its projection."""
    return _choose(x_TD, implementation).gated_rms_norm(x_TD, gate_TD, weight_D, eps)


def gated_scale(
    x_TD: Tensor, gate_TD: Tensor, weight_D: Tensor, scale_T: Tensor, *, implementation: str = AUTO
) -> Tensor:
    """``x_t * scale_t * weight * sigmoid(gate)``: :func:`gated_rms_norm` of rows of which only a part is here.

    Args:
        scale_T: ``1 / sqrt(mean of squares of the whole row + eps)``, float32 (float64 for float64); differentiable,
            as all inputs are.
    """
    return _choose(x_TD, implementation).gated_scale(x_TD, gate_TD, weight_D, scale_T)


def sum_of_squares(x_TD: Tensor) -> Tensor:
    """Of each row: ``[T]``, float32 (float64 for float64), differentiable."""
    return _SumOfSquares.apply(x_TD)


class _SumOfSquares(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD):
        ctx.save_for_backward(x_TD)
        return torch.linalg.vector_norm(x_TD, dim=1, dtype=torch.promote_types(x_TD.dtype, torch.float32)).square()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_T):
        (x_TD,) = ctx.saved_tensors
        return (x_TD * (2 * d_T)[:, None]).to(x_TD.dtype)
