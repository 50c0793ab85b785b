"""AdamW as separate PyTorch ops: any device and dtype.

Shape legend: N parameters, flat.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
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
    step, learning_rate, grad_scale = step.double(), learning_rate.double(), grad_scale.double()
    dtype, keeps = master_N.dtype, frozen != 0
    new_grad_N = grad_N.to(dtype) * grad_scale
    new_avg_N = beta1 * exp_avg_N.to(dtype) + (1 - beta1) * new_grad_N
    new_sq_N = beta2 * exp_avg_sq_N.to(dtype) + (1 - beta2) * new_grad_N.square()
    denominator_N = new_sq_N.sqrt() / (1 - beta2**step).sqrt() + eps
    new_N = (1 - learning_rate * weight_decay) * master_N
    new_N -= learning_rate / (1 - beta1**step) * new_avg_N / denominator_N
    pairs = [(master_N, new_N), (exp_avg_N, new_avg_N), (exp_avg_sq_N, new_sq_N)]
    pairs += [] if weight_N is None else [(weight_N, new_N)]
    for old_N, updated_N in pairs:
        old_N.copy_(old_N.where(keeps, updated_N.to(old_N.dtype)))
    not_finite.masked_fill_(~keeps & ~new_N.isfinite().all(), 1)


def squared_norm(grad_N: Tensor) -> Tensor:
    return torch.linalg.vector_norm(grad_N, dtype=torch.float64).square()
