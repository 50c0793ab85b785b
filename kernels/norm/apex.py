"""RMSNorm by the fused kernel of NVIDIA's apex, residual and gate as PyTorch ops beside it."""

from __future__ import annotations

import torch
from apex.normalization.fused_layer_norm import fused_rms_norm_affine
from torch import Tensor

from minimax_train.kernels.norm.pytorch import gated_scale

__all__ = ["add_rms_norm", "gated_rms_norm", "gated_scale", "rms_norm", "rms_norm_twice"]


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return fused_rms_norm_affine(x_TD, weight_D, list(weight_D.shape), eps)


def rms_norm_twice(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return (out_TD := rms_norm(x_TD, weight_D, eps)), out_TD


def add_rms_norm(h_TD: Tensor, f_TD: Tensor, weight_D: Tensor, alpha: float, eps: float) -> Tensor:
    return rms_norm(torch.add(f_TD, h_TD, alpha=alpha), weight_D, eps)


def gated_rms_norm(x_TD: Tensor, gate_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return rms_norm(x_TD, weight_D, eps) * torch.sigmoid(gate_TD)
