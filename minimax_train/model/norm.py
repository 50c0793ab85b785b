"""RMSNorm and what is joined with it: the residual before, the gate after. One weight each, named ``weight``.

Shape legend: T tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minimax_train.kernels.norm import add_rms_norm, gated_rms_norm, gated_scale, rms_norm, sum_of_squares
from minimax_train.model.kernels import KernelConfig
from minimax_train.model.sharding import local
from minimax_train.parallel.tensor import TensorParallel


class RMSNorm(nn.Module):
    """``norm(x)``."""

    def __init__(self, width: int, eps: float, kernels: KernelConfig) -> None:
        super().__init__()
        self.eps, self.implementation = eps, kernels.norm
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_TD: Tensor) -> Tensor:
        return rms_norm(x_TD, self.weight, self.eps, implementation=self.implementation)


class ResidualRMSNorm(RMSNorm):
    """``norm(alpha * h + f)``."""

    def forward(self, h_TD: Tensor, f_TD: Tensor, alpha: float) -> Tensor:
        return add_rms_norm(h_TD, f_TD, self.weight, alpha=alpha, eps=self.eps, implementation=self.implementation)


class GatedRMSNorm(RMSNorm):
    """``norm(x) * sigmoid(gate)``; the ranks of ``tp`` hold equal parts of the width."""

    def __init__(self, width: int, eps: float, kernels: KernelConfig, tp: TensorParallel) -> None:
        super().__init__(width, eps, kernels)
        self.tp = tp

    def forward(self, x_TD: Tensor, gate_TD: Tensor) -> Tensor:
        if self.tp.size == 1:
            return gated_rms_norm(x_TD, gate_TD, self.weight, eps=self.eps, implementation=self.implementation)
        scale_T = (self.tp.sum(sum_of_squares(x_TD)) / self.weight.numel() + self.eps).rsqrt()
        return gated_scale(x_TD, gate_TD, local(self.weight), scale_T, implementation=self.implementation)
