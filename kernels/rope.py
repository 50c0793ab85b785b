"""Rotary position embedding on the first R of K head dimensions (RoFormer, arXiv 2104.09864; half-split pairing).

Shape legend: T tokens, H heads, K head dim, R rotary dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(positions_T: Tensor, rotary_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[T, R / 2]`` in float32 of ``position * base^(-2i / R)``.

    Frequencies and angles are float32, as in transformers and the inference engines that will read the weights.
    """
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=positions_T.device) / rotary_dim
    angles = positions_T.float()[:, None] * (1.0 / base**exponent)
    return angles.cos(), angles.sin()


def apply_rotary(x_THK: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotate pairs (i, i + R / 2) of the first R dimensions; the others pass through. Same dtype as x."""
    half = cos_TR.shape[-1]
    first, second, rest = x_THK.split([half, half, x_THK.shape[-1] - 2 * half], dim=-1)
    cos, sin = cos_TR[:, None].to(x_THK.dtype), sin_TR[:, None].to(x_THK.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
