"""The norms one token at a time, from their formulas: the reference."""

from __future__ import annotations

import torch
from torch import Tensor


def _normalised(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    mean_square = sum(value * value for value in x_D) / len(x_D)
    return x_D / (mean_square + eps) ** 0.5 * weight_D


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight``."""
    return torch.stack([_normalised(x_D, weight_D, eps) for x_D in x_TD])


def rms_norm_twice(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of x, and the same again."""
    return (out_TD := rms_norm(x_TD, weight_D, eps)), out_TD


def add_rms_norm(h_TD: Tensor, f_TD: Tensor, weight_D: Tensor, alpha: float, eps: float) -> Tensor:
    """The norm of ``alpha * h + f``."""
    return rms_norm(torch.stack([alpha * h + f for h, f in zip(h_TD, f_TD, strict=True)]), weight_D, eps)


def gated_rms_norm(x_TD: Tensor, gate_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The norm of x, times ``1 / (1 + exp(-gate))``."""
    return rms_norm(x_TD, weight_D, eps) / (1 + (-gate_TD).exp())


def gated_scale(x_TD: Tensor, gate_TD: Tensor, weight_D: Tensor, scale_T: Tensor) -> Tensor:
    """``x * scale * weight``, times ``1 / (1 + exp(-gate))``."""
    return torch.stack([x_D * scale * weight_D for x_D, scale in zip(x_TD, scale_T, strict=True)]) / (
        1 + (-gate_TD).exp()
    )
