"""RMSNorm and what is joined with it: the residual before, the gate after. One weight each, named ``weight``.

Shape legend: T tokens, D width.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from minimax_train.kernels.norm import (
    add_rms_norm,
    gated_rms_norm,
    gated_scale,
    rms_norm,
    rms_norm_twice,
    sum_of_squares,
)
from minimax_train.model.kernels import KernelConfig
from minimax_train.model.recompute import cheap
from minimax_train.model.sharding import local
from minimax_train.parallel.tensor import TensorParallel


class RMSNorm(nn.Module):
    """``norm(x)``."""

    def __init__(self, width: int, eps: float, kernels: KernelConfig) -> None:
        super().__init__()
        self.eps, self.implementation = eps, kernels.norm
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_TD: Tensor) -> Tensor:
        run = partial(rms_norm, eps=self.eps, implementation=self.implementation)
        return cheap(run, x_TD, self.weight)


class TwiceRMSNorm(RMSNorm):
    """``norm(x)`` for a sublayer, and again for the residual around it."""

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        run = partial(rms_norm_twice, eps=self.eps, implementation=self.implementation)
        return cheap(run, x_TD, self.weight)


class ResidualRMSNorm(RMSNorm):
    """``norm(alpha * h + f)``."""

    def forward(self, h_TD: Tensor, f_TD: Tensor, alpha: float) -> Tensor:
        run = partial(add_rms_norm, alpha=alpha, eps=self.eps, implementation=self.implementation)
        return cheap(run, h_TD, f_TD, self.weight)


class GatedRMSNorm(RMSNorm):
    """``norm(x) * sigmoid(gate)``; the ranks of ``tp`` hold equal parts of the width."""

    def __init__(self, width: int, eps: float, kernels: KernelConfig, tp: TensorParallel) -> None:
        super().__init__(width, eps, kernels)
        self.tp, self.width = tp, width

    def forward(self, x_TD: Tensor, gate_TD: Tensor) -> Tensor:
        if self.tp.size == 1:
            run = partial(gated_rms_norm, eps=self.eps, implementation=self.implementation)
            return cheap(run, x_TD, gate_TD, self.weight)
        scale_T = (self.tp.sum(sum_of_squares(x_TD)) / self.width + self.eps).rsqrt()
        run = partial(gated_scale, implementation=self.implementation)
        return cheap(run, x_TD, gate_TD, local(self.weight), scale_T)
