"""AdamW in one kernel: everything is read once and written once.

Shape legend: N parameters, flat; P programs.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from minimax_train.kernels.adamw import triton_kernels

BLOCK = 2048  # elements of each tensor at a time: with 8 warps, 8 of each in a thread
NORM_BLOCK, NORM_BLOCKS = 4096, 4


def adamw_(
    master_N: Tensor,
    grad_N: Tensor,
    exp_avg_N: Tensor,
    exp_avg_sq_N: Tensor,
    weight_N: Tensor | None,
    *,
    step: Tensor,
    learning_rate: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: Tensor,
    frozen: Tensor,
    not_finite: Tensor,
) -> None:
    """
    Raises:
        ValueError: for weights that are not float32.
    """
    if master_N.dtype != torch.float32:
        raise ValueError(f"kernels.adamw='triton' updates float32 weights, got {master_N.dtype}")
    tensors = (master_N, grad_N, exp_avg_N, exp_avg_sq_N, *(() if weight_N is None else (weight_N,)))
    assert all(x_N.is_contiguous() and x_N.numel() == master_N.numel() for x_N in tensors)
    logs = (math.log(beta) if beta else -math.inf for beta in (beta1, beta2))
    if size := master_N.numel():
        triton_kernels.adamw[(triton.cdiv(size, BLOCK),)](
            master_N, grad_N, exp_avg_N, exp_avg_sq_N, weight_N, step, learning_rate, grad_scale, frozen, not_finite,
            size, *logs, beta1, beta2, 1 - beta1, 1 - beta2, eps, weight_decay, B=BLOCK, num_warps=8,
        )  # fmt: skip


def squared_norm(grad_N: Tensor) -> Tensor:
    """
    Raises:
        ValueError: for float64.
    """
    if grad_N.dtype == torch.float64:
        raise ValueError("kernels.adamw='triton' computes in float32 and takes no float64")
    assert grad_N.is_contiguous()
    size = grad_N.numel()
    partial_P = torch.empty(triton.cdiv(size, NORM_BLOCK * NORM_BLOCKS), dtype=torch.float64, device=grad_N.device)
    if size:
        triton_kernels.sum_squares[(len(partial_P),)](
            grad_N, partial_P, size, B=NORM_BLOCK, BLOCKS=NORM_BLOCKS, num_warps=8
        )
    return partial_P.sum()
