"""The norms as separate PyTorch ops: any device and dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x_TD, weight_D.shape, weight_D, eps)


def rms_norm_twice(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return (out_TD := rms_norm(x_TD, weight_D, eps)), out_TD


def add_rms_norm(h_TD: Tensor, f_TD: Tensor, weight_D: Tensor, alpha: float, eps: float) -> Tensor:
    return rms_norm(torch.add(f_TD, h_TD, alpha=alpha), weight_D, eps)


def gated_rms_norm(x_TD: Tensor, gate_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return rms_norm(x_TD, weight_D, eps) * torch.sigmoid(gate_TD)


def gated_scale(x_TD: Tensor, gate_TD: Tensor, weight_D: Tensor, scale_T: Tensor) -> Tensor:
    return (x_TD * scale_T[:, None]).to(x_TD.dtype) * weight_D * torch.sigmoid(gate_TD)
