"""Forward and backward of the experts' products as phases of their own, for callers with transfers to place between.

Autograd makes the gradients of rows and of weights in one go. Who sends the gradients of the rows to other ranks wants
them first, and the weights' meanwhile. No implementation here waits for a GPU but ``loop``.

Shape legend: R rows sorted by expert, D hidden, E experts, F expert hidden, T tokens, K choices per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minimax_train.kernels.dispatch import AUTO
from minimax_train.kernels.experts import ExpertRows, add_choices, permute
from minimax_train.kernels.experts.products import expert_products


def experts_forward(
    x_RD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, offsets_E: Tensor, *, implementation: str = AUTO
) -> tuple[Tensor, Tensor]:
    """As :func:`minimax_train.kernels.experts.grouped_swiglu`; also gate and up ``[R, 2F]``, for backward.

    Args:
        offsets_E: end row of each expert, int32; the last is R, here and in the gradients of rows.
    """
    if len(x_RD) == 0:
        return x_RD.new_empty(0, down_EDF.shape[1]), x_RD.new_empty(0, gate_up_E2FD.shape[1])
    products = expert_products(x_RD, down_EDF.shape[2], implementation)
    hidden_R2F, act_RF = products.up(x_RD, gate_up_E2FD, offsets_E)
    return products.down(act_RF, down_EDF, offsets_E), hidden_R2F


def experts_backward_rows(
    dy_RD: Tensor,
    hidden_R2F: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    offsets_E: Tensor,
    act_RF: Tensor,
    d_hidden_R2F: Tensor,
    *,
    implementation: str = AUTO,
) -> Tensor:
    """The gradient of x ``[R, D]``; writes the activation and the gradient of gate and up into the last two tensors."""
    if len(dy_RD) == 0:
        return torch.empty_like(dy_RD)
    products = expert_products(dy_RD, down_EDF.shape[2], implementation)
    products.d_hidden(dy_RD, hidden_R2F, down_EDF, offsets_E, out=(d_hidden_R2F, act_RF))
    return products.dx(d_hidden_R2F, gate_up_E2FD, offsets_E)


def experts_backward_gate_up(
    x_RD: Tensor, d_hidden_R2F: Tensor, offsets_E: Tensor, *, implementation: str = AUTO
) -> Tensor:
    """The gradient of gate and up ``[E, 2F, D]``; zero for an expert without rows."""
    if len(x_RD) == 0:
        return x_RD.new_zeros(len(offsets_E), d_hidden_R2F.shape[1], x_RD.shape[1])
    products = expert_products(x_RD, d_hidden_R2F.shape[1] // 2, implementation)
    return products.d_gate_up(d_hidden_R2F, x_RD, offsets_E)


def experts_backward_down(dy_RD: Tensor, act_RF: Tensor, offsets_E: Tensor, *, implementation: str = AUTO) -> Tensor:
    """The gradient of down ``[E, D, F]``; zero for an expert without rows."""
    if len(dy_RD) == 0:
        return dy_RD.new_zeros(len(offsets_E), dy_RD.shape[1], act_RF.shape[1])
    return expert_products(dy_RD, act_RF.shape[1], implementation).d_down(dy_RD, act_RF, offsets_E)


def tokens_forward(
    x_TD: Tensor,
    weights_TK: Tensor,
    rows: ExpertRows,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    *,
    implementation: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """As :func:`minimax_train.kernels.experts.expert_mlp`; also gate and up ``[R, 2F]``, for backward."""
    products, how = expert_products(x_TD, down_EDF.shape[2], implementation), {"implementation": implementation}
    x_RD = permute(x_TD, rows, **how)
    hidden_R2F, act_RF = products.up(x_RD, gate_up_E2FD, rows.offsets_E, weights_TK, rows.choice_R)
    return add_choices(products.down(act_RF, down_EDF, rows.offsets_E), rows, **how), hidden_R2F


def tokens_backward(
    dy_TD: Tensor,
    hidden_R2F: Tensor,
    weights_TK: Tensor,
    rows: ExpertRows,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    act_RF: Tensor,
    d_hidden_R2F: Tensor,
    *,
    implementation: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Gradients of x ``[T, D]`` and of the weights ``[T, K]``.

    Writes the activation, times the weights, and the gradient of gate and up into the last two tensors.
    """
    products, how = expert_products(dy_TD, down_EDF.shape[2], implementation), {"implementation": implementation}
    dy_RD = permute(dy_TD, rows, **how)
    _, _, d_weights_TK = products.d_hidden(
        dy_RD, hidden_R2F, down_EDF, rows.offsets_E, weights_TK, rows.choice_R, out=(d_hidden_R2F, act_RF)
    )
    return add_choices(products.dx(d_hidden_R2F, gate_up_E2FD, rows.offsets_E), rows, **how), d_weights_TK
