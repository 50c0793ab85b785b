"""Forward and backward of the experts' products as phases of their own, for callers with transfers to place between.

Autograd makes the gradients of rows and of weights in one go. Who sends the gradients of the rows to other ranks wants
them first, and the weights' meanwhile. No implementation here waits for a GPU but ``loop``.

Shape legend: R rows sorted by expert, none past the last offset, D hidden, E experts, F expert hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minimax_train.kernels.dispatch import AUTO
from minimax_train.kernels.experts.grouped import LOOP, GroupedGemm, choose_gemm


def experts_forward(
    x_RD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, offsets_E: Tensor, *, implementation: str = AUTO
) -> tuple[Tensor, Tensor]:
    """As :func:`minimax_train.kernels.experts.grouped_swiglu`; also gate and up ``[R, 2F]``, for backward.

    Args:
        offsets_E: end row of each expert, int32; the last is R.
    """
    if len(x_RD) == 0:
        return x_RD.new_empty(0, down_EDF.shape[1]), x_RD.new_empty(0, gate_up_E2FD.shape[1])
    gemm = _gemm(x_RD, implementation)
    gate_up_R2F = gemm.rows(x_RD, gate_up_E2FD.mT, offsets_E)
    act_RF = x_RD.new_empty(len(x_RD), down_EDF.shape[2])
    _swiglu(gate_up_R2F, act_RF, offsets_E, implementation)
    return gemm.rows(act_RF, down_EDF.mT, offsets_E), gate_up_R2F


def experts_backward_rows(
    dy_RD: Tensor,
    gate_up_R2F: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    offsets_E: Tensor,
    act_RF: Tensor,
    d_gate_up_R2F: Tensor,
    *,
    implementation: str = AUTO,
) -> Tensor:
    """The gradient of x ``[R, D]``; writes the activation and the gradient of gate and up into the last two tensors."""
    if len(dy_RD) == 0:
        return torch.empty_like(dy_RD)
    gemm = _gemm(dy_RD, implementation)
    d_act_RF = gemm.rows(dy_RD, down_EDF, offsets_E)
    _swiglu_backward(gate_up_R2F, d_act_RF, act_RF, d_gate_up_R2F, offsets_E, implementation)
    return gemm.rows(d_gate_up_R2F, gate_up_E2FD, offsets_E)


def experts_backward_weights(
    x_RD: Tensor,
    dy_RD: Tensor,
    act_RF: Tensor,
    d_gate_up_R2F: Tensor,
    offsets_E: Tensor,
    *,
    implementation: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Gradients of both weights, ``[E, 2F, D]`` and ``[E, D, F]``; zero for an expert without rows."""
    if len(x_RD) == 0:
        E, D, F = len(offsets_E), x_RD.shape[1], act_RF.shape[1]
        return x_RD.new_zeros(E, 2 * F, D), x_RD.new_zeros(E, D, F)
    gemm = _gemm(x_RD, implementation)
    return gemm.weights(d_gate_up_R2F, x_RD, offsets_E), gemm.weights(dy_RD, act_RF, offsets_E)


def _gemm(x: Tensor, implementation: str) -> GroupedGemm:
    return LOOP if implementation == "loop" else choose_gemm(x)


def _fused(x: Tensor, implementation: str) -> bool:
    return implementation == "triton" or (implementation == AUTO and x.is_cuda and x.dtype != torch.float64)


def _swiglu(gate_up_R2F: Tensor, act_RF: Tensor, offsets_E: Tensor, implementation: str) -> None:
    if _fused(act_RF, implementation):
        from minimax_train.kernels.experts.triton import swiglu_into

        return swiglu_into(gate_up_R2F, act_RF, offsets_E)
    gate_RF, up_RF = _wide(gate_up_R2F).chunk(2, dim=-1)
    act_RF.copy_(torch.nn.functional.silu(gate_RF) * up_RF)


def _swiglu_backward(
    gate_up_R2F: Tensor,
    d_act_RF: Tensor,
    act_RF: Tensor,
    d_gate_up_R2F: Tensor,
    offsets_E: Tensor,
    implementation: str,
) -> None:
    if _fused(act_RF, implementation):
        from minimax_train.kernels.experts.triton import swiglu_backward_into

        return swiglu_backward_into(gate_up_R2F, d_act_RF, act_RF, d_gate_up_R2F, offsets_E)
    gate_RF, up_RF = _wide(gate_up_R2F).chunk(2, dim=-1)
    d_act_RF, sigmoid_RF = _wide(d_act_RF), gate_RF.sigmoid()
    silu_RF = gate_RF * sigmoid_RF
    act_RF.copy_(silu_RF * up_RF)
    d_gate_RF, d_up_RF = d_gate_up_R2F.chunk(2, dim=-1)
    d_gate_RF.copy_(d_act_RF * up_RF * (sigmoid_RF + silu_RF * (1 - sigmoid_RF)))
    d_up_RF.copy_(d_act_RF * silu_RF)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype.itemsize == 2 else x
